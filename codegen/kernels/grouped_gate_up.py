"""Multiply every expert's rows by its first matrix and apply the activation: inner[T*K, I].

A program makes one tile of `inner`. It gathers its rows of `hidden` in the load, computes gates and
ups from the same rows (so they are read once and the activation stays in registers), and stores the
result in sorted order, which makes the second product's rows contiguous.
"""

import triton
import triton.language as tl

from moecc.codegen.kernels.choices import locate
from moecc.codegen.kernels.low_bit import load_packed
from moecc.codegen.kernels.tiles import load_tile, multiply


@triton.jit
def store_inner(
    gate,  # [M, N] float32
    up,
    expert,
    n,
    position,
    end,
    bias_ptr,
    learned_ptr,
    inner_ptr,
    INTERMEDIATE: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add biases, activate and store columns n of the rows before `end`."""
    in_n = n < INTERMEDIATE
    if bias_ptr is not None:
        OUTPUTS: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
        STEP: tl.constexpr = 2 if GATED and INTERLEAVED else 1
        bias_ptrs = bias_ptr + expert.to(tl.int64) * OUTPUTS + n * STEP
        gate += tl.load(bias_ptrs, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            bias_ptrs += 1 if INTERLEAVED else INTERMEDIATE
            up += tl.load(bias_ptrs, mask=in_n, other=0.0).to(tl.float32)[None, :]
    learned = 1.0
    if learned_ptr is not None:
        learned_ptrs = learned_ptr + expert.to(tl.int64) * INTERMEDIATE + n
        learned = tl.load(learned_ptrs, mask=in_n, other=0.0).to(tl.float32)[None, :]
    inner = ACTIVATION(gate, up, learned)
    out = inner_ptr + position.to(tl.int64)[:, None] * INTERMEDIATE + n[None, :]
    mask = (position < end)[:, None] & in_n[None, :]
    tl.store(out, inner.to(inner_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["active", "num_tiles"])
def grouped_gate_up(
    hidden_ptr,  # [T, H]
    weight_ptr,  # [E, R, H], or [E, H, R] if TRANSPOSED; R = 2I if GATED and not SPLIT, else I;
    # [E, bytes] if PACKED
    up_ptr,  # [E, I, H], or [E, H, I] if TRANSPOSED; None unless SPLIT; [E, bytes] if PACKED
    bias_ptr,  # [E, 2I if GATED else I] or None
    learned_ptr,  # [E, I] or None
    slots_ptr,  # [E] or None
    order_ptr,  # [T*K], see routing
    tiles_ptr,  # [num_tiles, 3]
    inner_ptr,  # [T*K, I] in the order of `order`, written
    active,  # K
    num_tiles,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    MATRIX: tl.constexpr,  # elements from an expert's matrix to the next one's
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr,  # see low_bit, or None
    ACTIVATION: tl.constexpr,  # (gate or x, up, learned) -> value
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of inner
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,  # see multiply
):
    """Compute one BLOCK_M x BLOCK_N tile of inner."""
    NUM_N: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    OUTPUTS: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
    ROWS: tl.constexpr = INTERMEDIATE if SPLIT else OUTPUTS
    STRIDE_N: tl.constexpr = 1 if TRANSPOSED else HIDDEN
    STRIDE_K: tl.constexpr = ROWS if TRANSPOSED else 1
    # Gates and ups that alternate are one product twice as wide, split in the end. Those in two
    # halves are two products.
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    WIDTH: tl.constexpr = 2 if GATED and INTERLEAVED else 1

    # Eight row tiles by all columns at a time: neighbours find their weights in L2.
    program = tl.program_id(0)
    tile, column = tl.swizzle2d(program // NUM_N, program % NUM_N, num_tiles, NUM_N, 8)
    expert, first, end = load_tile(tiles_ptr, tile)
    if expert < 0:
        return

    position = first + tl.arange(0, BLOCK_M)
    token = tl.load(order_ptr + position, mask=position < end, other=0) // active
    n = column * BLOCK_N * WIDTH + tl.arange(0, BLOCK_N * WIDTH)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = hidden_ptr + token.to(tl.int64)[:, None] * HIDDEN + k[None, :]
    offsets = n.to(tl.int64)[None, :] * STRIDE_N + k.to(tl.int64)[:, None] * STRIDE_K
    slot, _ = locate(slots_ptr, expert.to(tl.int64), True)
    weight_ptr += slot * MATRIX
    if SPLIT:
        up_ptr += slot * MATRIX
    else:
        up_ptr = weight_ptr + INTERMEDIATE * STRIDE_N
    in_rows, in_n = position < end, n < INTERMEDIATE * WIDTH

    COLUMNS: tl.constexpr = BLOCK_N * WIDTH
    SHAPE: tl.constexpr = (COLUMNS, BLOCK_M) if SWAPPED else (BLOCK_M, COLUMNS)
    gate = tl.zeros(SHAPE, dtype=tl.float32)
    up = tl.zeros(SHAPE, dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        x_mask, w_mask = in_rows[:, None], in_n[None, :]
        if HIDDEN % BLOCK_K != 0:
            x_mask &= (k < HIDDEN - start)[None, :]
            w_mask &= (k < HIDDEN - start)[:, None]
        x = tl.load(x_ptrs, mask=x_mask, other=0.0).to(inner_ptr.dtype.element_ty)
        if PACKED is None:
            w = tl.load(weight_ptr + offsets, mask=w_mask, other=0.0)
        else:
            w = load_packed(weight_ptr, n, start, PACKED, BLOCK_K).to(x.dtype)
        gate = multiply(x, w, gate, SWAPPED)
        if HALVES:
            if PACKED is None:
                w = tl.load(up_ptr + offsets, mask=w_mask, other=0.0)
            else:
                w = load_packed(up_ptr, n, start, PACKED, BLOCK_K).to(x.dtype)
            up = multiply(x, w, up, SWAPPED)
        x_ptrs += BLOCK_K
        if PACKED is None:
            weight_ptr += BLOCK_K * STRIDE_K
            up_ptr += BLOCK_K * STRIDE_K

    if SWAPPED:
        gate, up = tl.trans(gate), tl.trans(up)
    if GATED and INTERLEAVED:
        gate, up = tl.split(tl.reshape(gate, (BLOCK_M, BLOCK_N, 2)))
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    store_inner(
        gate,
        up,
        expert,
        n,
        position,
        end,
        bias_ptr,
        learned_ptr,
        inner_ptr,
        INTERMEDIATE,
        GATED,
        INTERLEAVED,
        ACTIVATION,
    )

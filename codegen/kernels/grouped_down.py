"""Multiply inner[T*K, I] by every expert's second matrix: terms[T*K, H], one row an assignment.

The rows of `inner` lie sorted by expert; the epilogue scales each by its routing weight and stores
it at its assignment, so that `reduce_terms` adds the K terms of a token in a fixed order.
"""

import triton
import triton.language as tl

from moecc.codegen.kernels.choices import locate
from moecc.codegen.kernels.low_bit import load_packed
from moecc.codegen.kernels.tiles import load_tile, multiply


@triton.jit
def store_terms(
    out,  # [M, N] float32
    expert,
    n,
    position,
    end,
    bias_ptr,
    weights_ptr,
    order_ptr,
    terms_ptr,
    HIDDEN: tl.constexpr,
):
    """Add biases, scale by routing weights and store columns n of the rows before `end`."""
    in_rows, in_n = position < end, n < HIDDEN
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * HIDDEN + n
        out += tl.load(bias_ptrs, mask=in_n, other=0.0).to(tl.float32)[None, :]
    assignment = tl.load(order_ptr + position, mask=in_rows, other=0)
    weight = tl.load(weights_ptr + assignment, mask=in_rows, other=0.0).to(tl.float32)
    out *= weight[:, None]
    out_ptrs = terms_ptr + assignment.to(tl.int64)[:, None] * HIDDEN + n[None, :]
    mask = in_rows[:, None] & in_n[None, :]
    tl.store(out_ptrs, out.to(terms_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tiles"])
def grouped_down(
    inner_ptr,  # [T*K, I] in the order of `order`
    weight_ptr,  # [E, H, I], or [E, I, H] if DOWN_TRANSPOSED; [E, bytes] if PACKED
    bias_ptr,  # [E, H] or None
    slots_ptr,  # [E] or None
    weights_ptr,  # [T*K] routing weights
    order_ptr,  # [T*K], see routing
    tiles_ptr,  # [num_tiles, 3]
    terms_ptr,  # [T*K, H], written where the expert exists
    num_tiles,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    DOWN_MATRIX: tl.constexpr,  # elements from an expert's matrix to the next one's
    DOWN_TRANSPOSED: tl.constexpr,
    DOWN_PACKED: tl.constexpr,  # see low_bit, or None
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of terms
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,  # see multiply
):
    """Compute one BLOCK_M x BLOCK_N tile of terms."""
    NUM_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    STRIDE_N: tl.constexpr = 1 if DOWN_TRANSPOSED else INTERMEDIATE
    STRIDE_K: tl.constexpr = HIDDEN if DOWN_TRANSPOSED else 1

    program = tl.program_id(0)
    tile, column = tl.swizzle2d(program // NUM_N, program % NUM_N, num_tiles, NUM_N, 8)
    expert, first, end = load_tile(tiles_ptr, tile)
    if expert < 0:
        return

    position = first + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = inner_ptr + position.to(tl.int64)[:, None] * INTERMEDIATE + k[None, :]
    slot, _ = locate(slots_ptr, expert.to(tl.int64), True)
    weight_ptr += slot * DOWN_MATRIX
    w_ptrs = weight_ptr + n.to(tl.int64)[None, :] * STRIDE_N + k.to(tl.int64)[:, None] * STRIDE_K
    in_rows, in_n = position < end, n < HIDDEN

    SHAPE: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N)
    out = tl.zeros(SHAPE, dtype=tl.float32)
    for start in range(0, INTERMEDIATE, BLOCK_K):
        x_mask, w_mask = in_rows[:, None], in_n[None, :]
        if INTERMEDIATE % BLOCK_K != 0:
            x_mask &= (k < INTERMEDIATE - start)[None, :]
            w_mask &= (k < INTERMEDIATE - start)[:, None]
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        if DOWN_PACKED is None:
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            w = load_packed(weight_ptr, n, start, DOWN_PACKED, BLOCK_K).to(x.dtype)
        out = multiply(x, w, out, SWAPPED)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * STRIDE_K

    if SWAPPED:
        out = tl.trans(out)
    store_terms(out, expert, n, position, end, bias_ptr, weights_ptr, order_ptr, terms_ptr, HIDDEN)

"""Multiply each token by its experts' first matrices and activate, for few tokens: inner[T*K, I].

No sort and no tensor cores: with about one row an expert the product is bound by reading weights,
and a program per assignment and a few columns puts the most reads in flight.
"""

import triton
import triton.language as tl

from moecc.codegen.kernels.choices import locate
from moecc.codegen.kernels.low_bit import dot_packed


@triton.jit(do_not_specialize=["active"])
def decode_gate_up(
    hidden_ptr,  # [T, H]
    ids_ptr,  # [T*K]
    weight_ptr,  # [E, R, H], or [E, H, R] if TRANSPOSED; R = 2I if GATED and not SPLIT, else I;
    # [E, bytes] if PACKED
    up_ptr,  # [E, I, H], or [E, H, I] if TRANSPOSED; None unless SPLIT; [E, bytes] if PACKED
    bias_ptr,  # [E, 2I if GATED else I] or None
    learned_ptr,  # [E, I] or None
    slots_ptr,  # [E] or None
    inner_ptr,  # [T*K, I], written where the expert exists
    active,  # K
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    MATRIX: tl.constexpr,  # elements from an expert's matrix to the next one's
    EXPERTS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr,  # see low_bit, or None
    ACTIVATION: tl.constexpr,  # (gate or x, up, learned) -> value
    BLOCK_N: tl.constexpr,  # columns of inner
    BLOCK_K: tl.constexpr,
):
    """Compute BLOCK_N columns of inner for one assignment."""
    OUTPUTS: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
    ROWS: tl.constexpr = INTERMEDIATE if SPLIT else OUTPUTS
    STRIDE_N: tl.constexpr = 1 if TRANSPOSED else HIDDEN
    STRIDE_K: tl.constexpr = ROWS if TRANSPOSED else 1
    HALVES: tl.constexpr = GATED and not INTERLEAVED  # see grouped_gate_up
    WIDTH: tl.constexpr = 2 if GATED and INTERLEAVED else 1
    LANES: tl.constexpr = BLOCK_K if PACKED is None else BLOCK_K * PACKED.bits // 32

    column = tl.program_id(0)
    assignment = tl.program_id(1)
    expert = tl.load(ids_ptr + assignment).to(tl.int64)
    slot, valid = locate(slots_ptr, expert, (expert >= 0) & (expert < EXPERTS))
    if not valid:
        return

    n = column * BLOCK_N * WIDTH + tl.arange(0, BLOCK_N * WIDTH)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = hidden_ptr + (assignment // active).to(tl.int64) * HIDDEN + k
    offsets = n.to(tl.int64)[:, None] * STRIDE_N + k.to(tl.int64)[None, :] * STRIDE_K
    weight_ptr += slot * MATRIX
    if SPLIT:
        up_ptr += slot * MATRIX
    else:
        up_ptr = weight_ptr + INTERMEDIATE * STRIDE_N
    in_n = n < INTERMEDIATE * WIDTH

    gate = tl.zeros((BLOCK_N * WIDTH, LANES), dtype=tl.float32)
    up = tl.zeros((BLOCK_N * WIDTH, LANES), dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        in_k = k < HIDDEN - start
        mask = in_n[:, None] & in_k[None, :]
        x = tl.load(x_ptrs + start, mask=in_k, other=0.0).to(inner_ptr.dtype.element_ty)
        x = x.to(tl.float32)
        if PACKED is None:
            at = offsets + start * STRIDE_K
            gate += tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32) * x[None, :]
            if HALVES:
                up += tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32) * x[None, :]
        else:
            gate += dot_packed(weight_ptr, x, n, start, PACKED, BLOCK_K)
            if HALVES:
                up += dot_packed(up_ptr, x, n, start, PACKED, BLOCK_K)

    gate = tl.sum(gate, axis=1)
    up = tl.sum(up, axis=1)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * OUTPUTS + n
        gate += tl.load(bias_ptrs, mask=in_n, other=0.0).to(tl.float32)
        if HALVES:
            up += tl.load(bias_ptrs + INTERMEDIATE, mask=in_n, other=0.0).to(tl.float32)
    if GATED and INTERLEAVED:
        gate, up = tl.split(tl.reshape(gate, (BLOCK_N, 2)))
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    learned = 1.0
    if learned_ptr is not None:
        learned = tl.load(learned_ptr + expert * INTERMEDIATE + n, mask=n < INTERMEDIATE, other=0.0)
        learned = learned.to(tl.float32)
    inner = ACTIVATION(gate, up, learned)
    out = inner_ptr + assignment.to(tl.int64) * INTERMEDIATE + n
    tl.store(out, inner.to(inner_ptr.dtype.element_ty), mask=n < INTERMEDIATE)

"""Multiply each token by its experts' first matrices and activate, for few tokens: inner[T*K, I].

No sort and no tensor cores: with about one row an expert the product is bound by reading weights,
and a program per assignment and a few columns puts the most reads in flight.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["active"])
def decode_gate_up(
    hidden_ptr,  # [T, H]
    ids_ptr,  # [T*K]
    weight_ptr,  # [E, R, H], or [E, H, R] if TRANSPOSED; R = 2I if GATED and not SPLIT, else I
    up_ptr,  # [E, I, H], or [E, H, I] if TRANSPOSED; None unless SPLIT
    bias_ptr,  # [E, 2I if GATED else I] or None
    inner_ptr,  # [T*K, I], written where the expert exists
    active,  # K
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,  # (gate, up) -> value, or (x) -> value if not GATED
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

    column = tl.program_id(0)
    assignment = tl.program_id(1)
    expert = tl.load(ids_ptr + assignment).to(tl.int64)
    if (expert < 0) | (expert >= EXPERTS):
        return

    n = column * BLOCK_N * WIDTH + tl.arange(0, BLOCK_N * WIDTH)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = hidden_ptr + (assignment // active).to(tl.int64) * HIDDEN + k
    offsets = n.to(tl.int64)[:, None] * STRIDE_N + k.to(tl.int64)[None, :] * STRIDE_K
    weight_ptr += expert * (ROWS * HIDDEN)
    if SPLIT:
        up_ptr += expert * (ROWS * HIDDEN)
    else:
        up_ptr = weight_ptr + INTERMEDIATE * STRIDE_N
    in_n = n < INTERMEDIATE * WIDTH

    gate = tl.zeros((BLOCK_N * WIDTH, BLOCK_K), dtype=tl.float32)
    up = tl.zeros((BLOCK_N * WIDTH, BLOCK_K), dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        in_k = k < HIDDEN - start
        mask = in_n[:, None] & in_k[None, :]
        w = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
        x = tl.load(x_ptrs, mask=in_k, other=0.0).to(w.dtype).to(tl.float32)[None, :]
        gate += w.to(tl.float32) * x
        if HALVES:
            up += tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * x
        x_ptrs += BLOCK_K
        weight_ptr += BLOCK_K * STRIDE_K
        up_ptr += BLOCK_K * STRIDE_K

    gate = tl.sum(gate, axis=1)
    up = tl.sum(up, axis=1)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * OUTPUTS + n
        gate += tl.load(bias_ptrs, mask=in_n, other=0.0).to(tl.float32)
        if HALVES:
            up += tl.load(bias_ptrs + INTERMEDIATE, mask=in_n, other=0.0).to(tl.float32)
    if HALVES:
        inner = ACTIVATION(gate, up)
    elif GATED:
        gate, up = tl.split(tl.reshape(gate, (BLOCK_N, 2)))
        inner = ACTIVATION(gate, up)
    else:
        inner = ACTIVATION(gate)

    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    out = inner_ptr + assignment.to(tl.int64) * INTERMEDIATE + n
    tl.store(out, inner.to(inner_ptr.dtype.element_ty), mask=n < INTERMEDIATE)

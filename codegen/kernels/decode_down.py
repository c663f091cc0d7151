"""Multiply inner[T*K, I] by the experts' second matrices and add the K terms, for few tokens.

A program makes a few columns of one token's output: it loops over that token's experts, so the sum
over k needs no second kernel, no atomics and has one order.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["active"])
def decode_down(
    inner_ptr,  # [T*K, I], unwritten where the expert does not exist
    ids_ptr,  # [T*K]
    weights_ptr,  # [T*K] routing weights
    weight_ptr,  # [E, H, I], or [E, I, H] if DOWN_TRANSPOSED
    bias_ptr,  # [E, H] or None
    out_ptr,  # [T, H], written
    active,  # K
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    EXPERTS: tl.constexpr,
    DOWN_TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of out
    BLOCK_K: tl.constexpr,
):
    """Compute BLOCK_N columns of out for one token."""
    STRIDE_N: tl.constexpr = 1 if DOWN_TRANSPOSED else INTERMEDIATE
    STRIDE_K: tl.constexpr = HIDDEN if DOWN_TRANSPOSED else 1

    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_n = n < HIDDEN
    w_offsets = n.to(tl.int64)[:, None] * STRIDE_N + k.to(tl.int64)[None, :] * STRIDE_K

    out = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for j in range(active):
        assignment = token * active + j
        expert = tl.load(ids_ptr + assignment).to(tl.int64)
        # An expert that does not exist is masked rather than branched around, weights and all:
        # 0 * NaN would not be nothing.
        valid = (expert >= 0) & (expert < EXPERTS)
        weight = tl.load(weights_ptr + assignment, mask=valid, other=0.0).to(tl.float32)
        x_ptrs = inner_ptr + assignment * INTERMEDIATE + k
        w_ptrs = weight_ptr + expert * (HIDDEN * INTERMEDIATE) + w_offsets
        product = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for start in range(0, INTERMEDIATE, BLOCK_K):
            in_k = valid & (k < INTERMEDIATE - start)
            x = tl.load(x_ptrs, mask=in_k, other=0.0).to(tl.float32)
            w = tl.load(w_ptrs, mask=in_n[:, None] & in_k[None, :], other=0.0).to(tl.float32)
            product += w * x[None, :]
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * STRIDE_K
        term = tl.sum(product, axis=1)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert * HIDDEN + n, mask=valid & in_n, other=0.0)
            term += bias.to(tl.float32)
        out += weight * term
    tl.store(out_ptr + token * HIDDEN + n, out.to(out_ptr.dtype.element_ty), mask=in_n)

"""Multiply inner[T*K, I] by the experts' second matrices and add the K terms, for few tokens.

A program makes a few columns of one token's output: it loops over that token's experts, so the sum
over k needs no second kernel, no atomics and has one order.
"""

import triton
import triton.language as tl

from moecc.codegen.kernels.choices import load_choices, locate, next_choice
from moecc.codegen.kernels.low_bit import dot_packed
from moecc.codegen.kernels.shared import add_shared


@triton.jit(do_not_specialize=["active"])
def decode_down(
    inner_ptr,  # [T*K, I], unwritten where the expert does not exist
    ids_ptr,  # [T*K]
    weights_ptr,  # [T*K] routing weights
    weight_ptr,  # [E, H, I], or [E, I, H] if DOWN_TRANSPOSED; [E, bytes] if PACKED
    bias_ptr,  # [E, H] or None
    slots_ptr,  # [E] or None; with slots, terms are added onto what out holds
    shared_ptr,  # [T, H] or None
    scale_ptr,  # [T], which scales shared, or None
    out_ptr,  # [T, H], written
    active,  # K
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    DOWN_MATRIX: tl.constexpr,  # elements from an expert's matrix to the next one's
    EXPERTS: tl.constexpr,
    DOWN_TRANSPOSED: tl.constexpr,
    DOWN_PACKED: tl.constexpr,  # see low_bit, or None
    CHOICES: tl.constexpr,  # power of two >= K
    BLOCK_N: tl.constexpr,  # columns of out
    BLOCK_K: tl.constexpr,
):
    """Compute BLOCK_N columns of out for one token."""
    STRIDE_N: tl.constexpr = 1 if DOWN_TRANSPOSED else INTERMEDIATE
    STRIDE_K: tl.constexpr = HIDDEN if DOWN_TRANSPOSED else 1
    LANES: tl.constexpr = BLOCK_K if DOWN_PACKED is None else BLOCK_K * DOWN_PACKED.bits // 32

    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_n = n < HIDDEN
    offsets = n.to(tl.int64)[:, None] * STRIDE_N + k.to(tl.int64)[None, :] * STRIDE_K

    out_ptrs = out_ptr + token * HIDDEN + n
    out = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if slots_ptr is not None:
        out += tl.load(out_ptrs, mask=in_n, other=0.0)
    keys, count = load_choices(ids_ptr, slots_ptr, token, active, EXPERTS, CHOICES)
    key = -1
    for _ in range(count):
        key = next_choice(keys, key)
        expert = key // CHOICES
        assignment = token * active + key % CHOICES
        slot, _ = locate(slots_ptr, expert, True)
        x_ptrs = inner_ptr + assignment * INTERMEDIATE + k
        w_ptr = weight_ptr + slot.to(tl.int64) * DOWN_MATRIX
        product = tl.zeros((BLOCK_N, LANES), dtype=tl.float32)
        for start in range(0, INTERMEDIATE, BLOCK_K):
            in_k = k < INTERMEDIATE - start
            x = tl.load(x_ptrs + start, mask=in_k, other=0.0).to(tl.float32)
            if DOWN_PACKED is None:
                mask = in_n[:, None] & in_k[None, :]
                w = tl.load(w_ptr + offsets + start * STRIDE_K, mask=mask, other=0.0)
                product += w.to(tl.float32) * x[None, :]
            else:
                product += dot_packed(w_ptr, x, n, start, DOWN_PACKED, BLOCK_K)
        term = tl.sum(product, axis=1)
        if bias_ptr is not None:
            term += tl.load(bias_ptr + expert * HIDDEN + n, mask=in_n, other=0.0).to(tl.float32)
        out += tl.load(weights_ptr + assignment).to(tl.float32) * term
    out = add_shared(out, shared_ptr, scale_ptr, out_ptr, token, n, HIDDEN)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_n)

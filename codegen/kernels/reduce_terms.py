"""Add the K terms of each token: out[t] = sum over k of terms[t, k]."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["active"])
def reduce_terms(
    terms_ptr,  # [T, K, H], unwritten where the expert does not exist
    ids_ptr,  # [T, K]
    out_ptr,  # [T, H], written
    active,  # K
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add in float32, in the order of k, BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(active):
        assignment = token * active + j
        expert = tl.load(ids_ptr + assignment)
        valid = (expert >= 0) & (expert < EXPERTS)
        term = tl.load(terms_ptr + assignment * HIDDEN + n, mask=valid & (n < HIDDEN), other=0.0)
        total += term.to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + n, total.to(out_ptr.dtype.element_ty), mask=n < HIDDEN)

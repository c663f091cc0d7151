"""Add the K terms of each token: out[t] = sum over k of terms[t, k], experts ascending.

And the output of a shared expert, if there is one.
"""

import triton
import triton.language as tl

from moecc.codegen.kernels.choices import load_choices, next_choice
from moecc.codegen.kernels.shared import add_shared


@triton.jit(do_not_specialize=["active"])
def reduce_terms(
    terms_ptr,  # [T, K, H], unwritten where the expert does not exist
    ids_ptr,  # [T, K]
    slots_ptr,  # [E] or None; with slots, terms are added onto what out holds
    shared_ptr,  # [T, H] or None
    scale_ptr,  # [T], which scales shared, or None
    out_ptr,  # [T, H], written
    active,  # K
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,  # power of two >= K
    BLOCK: tl.constexpr,
):
    """Add in float32 BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out_ptrs = out_ptr + token * HIDDEN + n
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if slots_ptr is not None:
        total += tl.load(out_ptrs, mask=n < HIDDEN, other=0.0)
    keys, count = load_choices(ids_ptr, slots_ptr, token, active, EXPERTS, CHOICES)
    key = -1
    for _ in range(count):
        key = next_choice(keys, key)
        row = token * active + key % CHOICES
        total += tl.load(terms_ptr + row * HIDDEN + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
    total = add_shared(total, shared_ptr, scale_ptr, out_ptr, token, n, HIDDEN)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=n < HIDDEN)

"""Add a shared expert's output where the routed experts' sum is stored: no launch of its own."""

import triton
import triton.language as tl


@triton.jit
def add_shared(total, shared_ptr, scale_ptr, out_ptr, token, n, HIDDEN: tl.constexpr):
    """Add columns n of shared[token], times scale[token] if there is one.

    Rounds where torch would between its operators, so that the bits are those of separate ones.
    """
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + token * HIDDEN + n, mask=n < HIDDEN, other=0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + token).to(tl.float32)
            shared = (scale * shared.to(tl.float32)).to(shared_ptr.dtype.element_ty)
        total = total.to(out_ptr.dtype.element_ty).to(tl.float32) + shared.to(tl.float32)
    return total

"""Activation functions that Triton lacks or defines differently from torch.

No libdevice: it cannot run in Triton's interpreter, and `exp` is enough.
"""

import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    """Return the larger; NaN if either is (as torch.maximum, unlike CUDA's fmax)."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """Return the smaller; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def silu(x):
    """Return x * sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def gelu(x):
    """Return x * Phi(x), the exact form."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))  # 1 / sqrt(2)


@triton.jit
def gelu_tanh(x):
    """Return the tanh form of gelu, 0.5 * x * (1 + tanh(u)), which is x * sigmoid(2u)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)
    return x * tl.sigmoid(2.0 * u)


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent; by its series near zero, where the other form cancels."""
    square = x * x
    series = x * (1.0 + square * (-0.3333333333333333 + square * 0.13333333333333333))
    return tl.where(tl.abs(x) < 0.1, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def square(x):
    """Return x * x; a function, so that the operand is computed once."""
    return x * x


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), also where 1 + exp(-|x|) rounds to 1."""
    small = tl.exp(-tl.abs(x))
    total = 1.0 + small
    # Kahan: what rounding the sum lost is in (total - 1) as well as in its logarithm.
    log1p = tl.where(total == 1.0, small, tl.log(total) * small / (total - 1.0))
    return tl.maximum(x, 0.0) + log1p

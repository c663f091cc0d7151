"""Write dense layers of the same inputs, y = x W^T + b each, and call them.

Weights are read where the model has them, in bf16 or fp16, or from a low-bit copy that is packed
on the first call and stays beside them; inputs are rounded then as experts' are (`emit.py`). Sums
are float32 and the bias is added before the result is rounded, once. A token's row has the same
bits for any number of threads, and whichever other tokens share the batch. Where the CPU has bf16
dot products, those are used.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moecc.codegen.native.build import load
from moecc.codegen.native.call import address, plain, thread_count
from moecc.codegen.native.emit import TYPES, product, template
from moecc.runtime.errors import InputError, UnsupportedSpec
from moecc.runtime.linear import LinearsFn
from moecc.runtime.schemes.copies import Copies
from moecc.runtime.schemes.packing import pack, panel_bytes, quantize
from moecc.runtime.schemes.scheme import Scheme

DTYPES = (torch.bfloat16, torch.float16)
"""What models compute in that a CPU may have to widen first."""
GRAIN = 16
"""Rows of a packed panel."""
MOST = 4
"""Layers that one call computes: q, k and v, or a gate and an up projection, and one besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearKernel:
    """What serves all dense layers of a dtype and a scheme."""

    key: str
    """Its name in graphs, reports and counters."""
    run: LinearsFn
    source: str


_pointers, _numbers = ctypes.c_void_p * MOST, ctypes.c_int64 * MOST


class _Linear(ctypes.Structure):
    """The arguments of `moecc_linear`; the order of `struct Linear` in linear.cpp."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, _pointers) for name in ("weights", "bias", "out")),
        *((name, _numbers) for name in ("N", "row")),
        *((name, ctypes.c_int64) for name in ("T", "K", "layers", "threads")),
    ]


def emit(dtype: torch.dtype, scheme: Scheme | None = None) -> LinearKernel:
    """Write and build the kernel of all dense layers of a dtype, on copies in `scheme` if given.

    Raises `UnsupportedSpec` for a dtype that it is not for, `NoCompiler` (an `UnsupportedSpec`)
    when nothing can build it, `BuildError` when the build fails. The kernel raises `InputError`
    for weights that the scheme cannot hold (`packing.quantize`).
    """
    source = write(dtype, scheme)
    function = _load(source)

    def run(
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor]:
        for weight, bias in zip(weights, biases, strict=True):
            _check(dtype, x, weight, bias)
        x = plain(x, dtype)
        inputs = x.shape[-1]
        biases = [None if bias is None else plain(bias, dtype) for bias in biases]
        sizes = [weight.shape[0] for weight in weights]
        if scheme is None:
            stored, rows = weights, [weight.stride(0) for weight in weights]
        else:
            stored = [_copies(scheme).of((weight,)) for weight in weights]
            rows = [panel_bytes(inputs, scheme)] * len(weights)
        outs = [torch.empty((*x.shape[:-1], size), dtype=dtype) for size in sizes]
        tokens = outs[0].numel() // sizes[0]
        call = _Linear(
            address(x),
            *(_pointers(*map(address, tensors)) for tensors in (stored, biases, outs)),
            *(_numbers(*values) for values in (sizes, rows)),
            *(tokens, inputs, len(weights), thread_count()),
        )
        if function(ctypes.byref(call)):
            raise MemoryError(f"linear layers {[[*one.shape] for one in weights]}, {tokens} tokens")
        return outs

    name = str(dtype).removeprefix("torch.")
    emitter = "native" if scheme is None else f"native {scheme}"
    return LinearKernel(key=f"{emitter}: linear {name} cpu", run=run, source=source)


def write(dtype: torch.dtype, scheme: Scheme | None = None) -> str:
    """Write the C++ source of a dtype's dense layers; raises `UnsupportedSpec`."""
    allowed = DTYPES if scheme is None else tuple(TYPES)
    if dtype not in allowed:
        names = ", ".join(map(str, allowed))
        raise UnsupportedSpec(f"dense layers of {names} have native kernels, of {dtype} none")
    model = TYPES[dtype]
    if scheme is None:
        header, kinds, grain = ("dot.h",), (model, f"Dot<{model}>"), 4
    else:
        header, kinds = ("quantized.h", "floating.h"), ("uint8_t", product(scheme, 64))
        grain = GRAIN
    facts = f"using Model = {model};\nusing Stored = {kinds[0]};\nusing Product = {kinds[1]};\n"
    facts += f"constexpr int64_t GRAIN = {grain};\nconstexpr int MOST = {MOST};"
    parts = map(template, ("vec.h", *header, "team.h", "tasks.h"))
    return "\n".join([*parts, facts, template("linear.cpp")])


@functools.cache
def _copies(scheme: Scheme) -> Copies[torch.Tensor]:
    """Keep what is packed in a scheme once for all graphs."""

    @torch.no_grad()
    def packed(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        (weight,) = tensors
        assert weight is not None
        return pack(quantize(weight, scheme), scheme)

    return Copies(packed)


def reads(weight: torch.Tensor) -> bool:
    """Tell whether a weight lies as the kernels read it: a matrix of contiguous rows."""
    return weight.dim() == 2 and weight.numel() > 0 and 1 in (weight.stride(1), weight.shape[1])


@functools.cache
def _load(source: str):
    function = load(source).moecc_linear
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
    return function


def _check(
    dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise `InputError` unless the kernel reads these tensors and nothing beyond them."""
    # Texts are for errors alone: this runs with every call.
    if not (reads(weight) and _is(weight, dtype)):
        raise _misfit("weight", weight, f"{dtype} [N, K] on cpu, not empty, rows contiguous")
    outputs, inputs = weight.shape
    if not (x.dim() > 0 and x.shape[-1] == inputs and _is(x, dtype)):
        raise _misfit("x", x, f"{dtype} [.., {inputs}] on cpu")
    if bias is not None and not (bias.shape == (outputs,) and _is(bias, dtype)):
        raise _misfit("bias", bias, f"{dtype} [{outputs}] on cpu")


def _is(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_cpu


def _misfit(name: str, tensor: torch.Tensor, expected: str) -> InputError:
    found = f"{tensor.dtype} {[*tensor.shape]}, strides {[*tensor.stride()]}, {tensor.device}"
    return InputError(f"{name} is {found}; a linear layer takes {expected}")

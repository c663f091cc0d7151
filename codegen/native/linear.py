"""Write a dense layer, y = x W^T + b, and call it.

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
from moecc.codegen.native.emit import TYPES, address, plain, product, template, thread_count
from moecc.runtime.errors import InputError, UnsupportedSpec
from moecc.runtime.linear import LinearFn
from moecc.runtime.schemes.copies import Copies
from moecc.runtime.schemes.packing import pack, panel_bytes, quantize
from moecc.runtime.schemes.scheme import Scheme

DTYPES = (torch.bfloat16, torch.float16)
"""What models compute in that a CPU may have to widen first."""
GRAIN = 16
"""Rows of a packed panel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearKernel:
    """What serves every dense layer of a dtype and a scheme."""

    key: str
    """Its name in graphs, reports and counters."""
    run: LinearFn
    source: str


class _Linear(ctypes.Structure):
    """The arguments of `moecc_linear`; the order of `struct Linear` in linear.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weights", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("T", "K", "N", "row", "threads")),
    ]


def emit(dtype: torch.dtype, scheme: Scheme | None = None) -> LinearKernel:
    """Write and build the kernel of all dense layers of a dtype, on copies in `scheme` if given.

    Raises `UnsupportedSpec` for a dtype that it is not for, `NoCompiler` (an `UnsupportedSpec`)
    when nothing can build it, `BuildError` when the build fails. The kernel raises `InputError`
    for weights that the scheme cannot hold (`packing.quantize`).
    """
    source = write(dtype, scheme)
    function = _load(source)

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        _check(dtype, x, weight, bias)
        x = plain(x, dtype)
        bias = None if bias is None else plain(bias, dtype)
        outputs, inputs = weight.shape
        if scheme is None:
            stored, row = weight, weight.stride(0)
        else:
            stored, row = _copies(scheme).of((weight,)), panel_bytes(inputs, scheme)
        out = torch.empty((*x.shape[:-1], outputs), dtype=dtype)
        rows = out.numel() // outputs
        tensors = map(address, (x, stored, bias, out))
        call = _Linear(*tensors, rows, inputs, outputs, row, thread_count())
        if function(ctypes.byref(call)):
            raise MemoryError(f"a linear layer {[*weight.shape]} of {rows} tokens")
        return out

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
    facts += f"constexpr int64_t GRAIN = {grain};"
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
    expected = f"{dtype} [N, K] on cpu, not empty, rows contiguous"
    _hold("weight", weight, reads(weight), expected, dtype)
    outputs, inputs = weight.shape
    fits = x.dim() > 0 and x.shape[-1] == inputs
    _hold("x", x, fits, f"{dtype} [.., {inputs}] on cpu", dtype)
    if bias is not None:
        _hold("bias", bias, bias.shape == (outputs,), f"{dtype} [{outputs}] on cpu", dtype)


def _hold(name: str, tensor: torch.Tensor, fits: bool, expected: str, dtype: torch.dtype) -> None:
    if not fits or tensor.dtype != dtype or not tensor.is_cpu:
        found = f"{tensor.dtype} {[*tensor.shape]}, strides {[*tensor.stride()]}, {tensor.device}"
        raise InputError(f"{name} is {found}; a linear layer takes {expected}")

"""Write a spec's experts as C++, and bind the built library to the kernel's signature.

One source serves every block with the same dtype, activation and layout: H, I, E, T, K and the
strides of the weights are arguments.

What holds for results: they do not depend on the number of threads, nor on which or how many other
tokens share the batch (a token's row is bit-identical for every T). Sums are float32; the weighted
sum adds experts in ascending order. Where the CPU has bf16 dot products and a bf16 block's second
product is output-major, activated values are rounded to bf16 before it, as eager torch does;
elsewhere they stay float32. With low-bit weights the inputs of both products are rounded to 8 bits,
one scale a block (`Scheme.block`), so that products are integer dot products; fp8 weights are
widened to float instead, and their inputs stay float.

Calls use torch's number of threads, or fewer: `team.h` says when. A forked child uses one.
"""

import ctypes
import functools
import re
from pathlib import Path

import torch

from moecc.codegen.activation import LEAVES, OPERATIONS, Expr, render
from moecc.codegen.native.build import load
from moecc.codegen.native.call import Block, Tensor, call, check
from moecc.codegen.native.checks import check_slots
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.runtime.errors import UnsupportedSpec
from moecc.runtime.schemes.scheme import Scheme

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What C++ calls the dtypes of a model."""
_CODES = {
    "int8": "Int8<{whole_rows}>",
    "mxfp4": "Mxfp4",
    **{f"int{bits}": f"Grouped<{bits}, {{zeros}}, {{points}}>" for bits in (2, 3, 4)},
}
_SCALES = {torch.float32: "Floats", torch.float16: "Halves", torch.uint8: "Powers"}
"""What codes and scales of a scheme are called in quantized.h."""
_RENAMED = {
    "abs": "absolute",
    "exp": "exp_",
    "max": "maximum",
    "min": "minimum",
    "neg": "negate",
    "tanh": "tanh_",
}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_TABLE = (
    {op: f"{_RENAMED.get(op, op)}({{0}})" for op, operands in OPERATIONS.items() if operands == 1}
    | {op: f"{_RENAMED[op]}({{0}}, {{1}})" for op in ("max", "min")}
    | {op: f"({{0}} {sign} {{1}})" for op, sign in _INFIX.items()}
    | {leaf: "gate" if leaf == "x" else leaf for leaf in LEAVES}
    | {"constant": "splat(float({0}))"}
)


def emit(spec: KernelSpec) -> Kernel:
    """Write and build the kernel of `spec`.

    Raises `UnsupportedSpec` for a spec that this emitter does not write, `NoCompiler`
    (an `UnsupportedSpec`) when nothing can build it, `BuildError` when the build fails.
    """
    source = write(spec)
    function = _load(source)
    known: dict[int, Block] = {}

    def run(
        hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *experts: Tensor
    ) -> torch.Tensor:
        same = hidden.dtype == spec.dtype
        out = torch.empty(hidden.shape, dtype=spec.dtype if same else torch.float32)
        block = known.get(id(experts[0])) if experts else None
        if block is None or not block.is_of(experts):
            block = check(spec, spec.experts, experts)
            if not block.copies:
                for key in [key for key, one in known.copy().items() if one.origins[0]() is None]:
                    known.pop(key, None)
                known[id(experts[0])] = block
        call(spec, function, (hidden, ids, weights), block, out)
        return out if same else out.to(hidden.dtype)

    def add(
        onto: torch.Tensor,
        slots: torch.Tensor,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *experts: Tensor,
    ) -> None:
        held = len(experts[0]) if experts and experts[0] is not None else 0
        check_slots(spec, onto, slots, hidden, held)
        call(spec, function, (hidden, ids, weights), check(spec, held, experts), onto, slots)

    return Kernel(spec=spec, emitter="native", run=run, add=add, source=source)


def write(spec: KernelSpec) -> str:
    """Write the C++ source of a spec; raises `UnsupportedSpec`."""
    if spec.device != "cpu":
        raise UnsupportedSpec(f"native kernels run on cpu, not on {spec.device!r}")
    if spec.dtype not in TYPES:
        names = ", ".join(str(dtype) for dtype in TYPES)
        raise UnsupportedSpec(f"native kernels read {names}, not {spec.dtype}")
    if spec.split and (spec.interleaved or not spec.gated):
        raise UnsupportedSpec("gate and up in two tensors are gated and do not alternate")
    if spec.schemes and (spec.split != spec.gated or spec.transposed or spec.down_transposed):
        raise UnsupportedSpec("low-bit weights are output-major, gate and up in two tensors")
    flags = ("gated", "interleaved", "bias", "learned")
    facts = [
        f"// {spec.activation} {spec.dtype} {spec.schemes or ''}".rstrip(),
        *_types(spec),
        *(f"constexpr bool {f.upper()} = {str(getattr(spec, f)).lower()};" for f in flags),
        '[[maybe_unused]] constexpr double inf = __builtin_inf(), nan = __builtin_nan("");',
        _activate(spec.activation),
    ]
    products = ("quantized.h", "floating.h") if spec.schemes else ("dot.h", "axpy.h")
    return "\n".join(
        [
            *map(template, ("vec.h", "math.h", *products, "team.h", "tasks.h")),
            *facts,
            template("experts.cpp"),
        ]
    )


def _types(spec: KernelSpec) -> list[str]:
    """Name the types of a block's values, and the product that each matrix takes."""
    model = TYPES[spec.dtype]
    if spec.schemes is None:
        kinds = ["Axpy" if turned else "Dot" for turned in (spec.transposed, spec.down_transposed)]
        stored, first, second = model, *(f"{kind}<{model}>" for kind in kinds)
    else:
        stored = "uint8_t"
        # A task of the first product makes whole blocks of the second's inputs, and no more:
        # threads wait half a task on average for the last one, twice a call.
        rows = max(spec.schemes.second.block, 32) * (2 if spec.gated else 1)
        first = product(spec.schemes.first, rows)
        second = product(spec.schemes.second, 32)
    names = {"Model": model, "Stored": stored, "First": first, "Second": second}
    return [f"using {name} = {kind};" for name, kind in names.items()]


def product(scheme: Scheme, rows: int) -> str:
    """Name the product with so many rows a task."""
    whole_rows, zeros, points = (
        str(one).lower() for one in (scheme.group is None, scheme.zeros, scheme.points)
    )
    if scheme.name == "fp8":
        scale = "OneFloat" if scheme.rows > 1 else "Floats"
        return f"Floating<{scale}, {whole_rows}, {scheme.block}, {rows}>"
    code = _CODES[scheme.name].format(whole_rows=whole_rows, zeros=zeros, points=points)
    return f"Quantized<{code}, {_SCALES[scheme.scale]}, {scheme.block}, {rows}>"


def _activate(expr: Expr) -> str:
    """Render the activation: `gate` is the only input of an expert that is not gated."""
    return (
        "static INLINE vf activate([[maybe_unused]] vf gate, [[maybe_unused]] vf up,\n"
        "                          [[maybe_unused]] vf learned) {\n"
        f"  return {render(expr, _TABLE)};\n}}\n"
    )


@functools.cache
def template(name: str) -> str:
    """Give a file of C++ as a part of a source that has no includes of its own."""
    text = (Path(__file__).parent / name).read_text()
    return re.sub(r'#pragma once\n|#include ".*"\n', "", text)


@functools.cache
def _load(source: str):
    function = load(source).moecc_experts
    function.argtypes = [ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function

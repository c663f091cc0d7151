"""Hand linear layers in bf16 and fp16 to our kernels where the CPU does not compute in them.

Needs: nothing.  Adds: linears.  Graph: each such layer is a `moecc.linear` that names its kernel.

    torch._C._nn.linear(x, weight, bias)
→
    moecc.linear(x, weight, bias, "native: linear bfloat16 cpu")

Attention, the dense parts of a MoE layer and the head would else take longer than its experts:
what torch calls widens every weight first. A layer in another dtype or on another device is not
meant. Where nothing can build the kernel, torch computes all of them, which is a miss.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moecc.codegen.native import linear
from moecc.codegen.native.isa import multiplies
from moecc.passes.axes import tensor_of
from moecc.passes.build import Builder
from moecc.passes.ir import DenseLinear, Lowering, Miss, Outcome, Program
from moecc.passes.options import Options
from moecc.passes.parameters import is_parameter
from moecc.passes.source import module_path
from moecc.runtime import linear as operator
from moecc.runtime.errors import BuildError, UnsupportedSpec

_TARGETS = (functional.linear, torch.ops.aten.linear.default)


def dense_linears(program: Program, options: Options) -> Outcome:
    """Replace every linear layer that a kernel of ours computes faster than torch."""
    if options.dense_linears is False or options.kernels not in ("auto", "native"):
        return Outcome(program=program, note="off: torch computes linear layers")
    found = _layers(program.gm.graph)
    if program.trains and found:
        return Outcome(program=program, note="off: gradients are wanted")
    notes: list[str] = []
    misses: list[Miss] = []
    done: list[DenseLinear] = []
    lowerings: list[Lowering] = []
    for dtype, layers in found.items():
        try:
            if options.dense_linears == "auto" and multiplies(dtype):
                notes.append(f"off: the CPU computes in {dtype}")
                continue
            kernel = linear.emit(dtype)
        except (UnsupportedSpec, BuildError) as error:
            why = f"torch computes {len(layers)} linear layers in {dtype}: {error}"
            misses.append(Miss(where="linear layers", why=why, fallback=True))
            continue
        operator.install(kernel.key, kernel.run)
        lowerings.append(Lowering(block="linear", kernel=kernel.key, source=kernel.source))
        done += [_replace(node, kernel.key) for node in layers]
    after = replace(
        program,
        linears=(*program.linears, *done),
        lowerings=(*program.lowerings, *lowerings),
    )
    if done:
        size = sum(one.inputs * one.outputs * one.dtype.itemsize for one in done)
        notes.append(f"{len(done)} layers, {size / 1e6:.1f} MB")
    note = "; ".join(notes)
    return Outcome(program=after, rewrites=len(done), misses=tuple(misses), note=note)


def _layers(graph: Graph) -> dict[torch.dtype, list[Node]]:
    """Give the linear layers that a kernel could compute, by dtype."""
    found: dict[torch.dtype, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _TARGETS:
            dtype = _dtype(node)
            if dtype is not None:
                found.setdefault(dtype, []).append(node)
    return found


def _dtype(node: Node) -> torch.dtype | None:
    """Give what all of a linear layer is in, if a kernel reads that where it lies."""
    x, weight, bias = _inputs(node)
    tensors = [tensor_of(one) for one in (x, weight, bias, node) if one is not None]
    matrix = tensor_of(weight)
    if matrix is None or not is_parameter(weight):
        return None  # computed: its layout may be another when the graph runs
    alike = all(
        one is not None
        and one.dtype == matrix.dtype  # autocast changes the result's
        and one.is_cpu
        and not is_traceable_wrapper_subclass(one)
        for one in tensors
    )
    readable = matrix.dtype in linear.DTYPES and linear.reads(matrix)
    return matrix.dtype if alike and readable else None


def _inputs(node: Node) -> tuple[Any, Any, Any]:
    names = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return names["input"], names["weight"], names.get("bias")


def _replace(node: Node, kernel: str) -> DenseLinear:
    x, weight, bias = _inputs(node)
    path = module_path(node)
    build = Builder(node.graph, node)
    call = build.function(torch.ops.moecc.linear.default, x, weight, bias, kernel, name="linear")
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
    matrix = weight.meta["example_value"]
    outputs, inputs = map(int, matrix.shape)
    return DenseLinear(path=path, inputs=inputs, outputs=outputs, dtype=matrix.dtype, kernel=kernel)

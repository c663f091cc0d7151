"""Hand linear layers to our kernels: in bf16 and fp16 where the CPU widens these, or in low bits.

Needs: blocks, for their routers.  Adds: linears.  Graph: each such layer is a `moecc.linear`.

    torch._C._nn.linear(x, weight, bias)
→
    moecc.linear(x, weight, bias, "native: linear bfloat16 cpu")

Attention, the dense parts of a MoE layer and the head would else take longer than its experts:
what torch calls widens every weight first. A layer in another dtype or on another device is not
meant, unless it has a scheme: that is a miss then. Layers that score experts, and gates of a few
outputs, are not rounded. Where nothing can build the kernel, torch computes all of them, which is
a miss.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moecc.codegen.native import linear
from moecc.codegen.native.isa import multiplies
from moecc.passes.axes import tensor_of
from moecc.passes.build import Builder
from moecc.passes.ir import DenseLinear, Lowering, Miss, Outcome, Program
from moecc.passes.options import Options
from moecc.passes.parameters import is_parameter
from moecc.passes.pattern import op_name
from moecc.passes.source import module_path
from moecc.runtime import linear as operator
from moecc.runtime.errors import BuildError, UnsupportedSpec
from moecc.runtime.schemes.scheme import Scheme

_TARGETS = (functional.linear, torch.ops.aten.linear.default)
_PRODUCTS = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "experts")
_WHERE = "linear layers"

Kind = tuple[torch.dtype, Scheme | None]


def dense_linears(program: Program, options: Options) -> Outcome:
    """Replace every linear layer that a kernel of ours computes faster than torch."""
    if options.dense_linears is False:
        return Outcome(program=program, note="off: torch computes linear layers")
    if options.kernels not in ("auto", "native"):
        why = f"no kernels={options.kernels!r} has dense_linears={options.dense_linears!r}"
        asked = options.dense_linears not in (True, "auto")
        misses = [Miss(where=_WHERE, why=why, fallback=True)] if asked else []
        note = "off: torch computes linear layers"
        return Outcome(program=program, misses=tuple(misses), note=note)
    found, misses = _layers(program, options)
    if program.trains and found:
        return Outcome(program=program, note="off: gradients are wanted")
    notes: list[str] = []
    done: list[DenseLinear] = []
    lowerings: list[Lowering] = []
    size = 0.0
    for (dtype, scheme), layers in found.items():
        try:
            if scheme is None and options.dense_linears is not True and multiplies(dtype):
                notes.append(f"off: the CPU computes in {dtype}")
                continue
            kernel = linear.emit(dtype, scheme)
        except (UnsupportedSpec, BuildError) as error:
            why = f"torch computes {len(layers)} linear layers in {dtype}: {error}"
            misses.append(Miss(where=_WHERE, why=why, fallback=True))
            continue
        operator.install(kernel.key, kernel.run)
        lowerings.append(Lowering(block="linear", kernel=kernel.key, source=kernel.source))
        handed = [_replace(node, kernel.key) for node in layers]
        bits = scheme.bits_per_weight if scheme else 8 * dtype.itemsize
        size += sum(one.inputs * one.outputs for one in handed) * bits / 8
        done += handed
    after = replace(
        program,
        linears=(*program.linears, *done),
        lowerings=(*program.lowerings, *lowerings),
    )
    if done:
        notes.append(f"{len(done)} layers, {size / 1e6:.1f} MB")
    note = "; ".join(notes)
    return Outcome(program=after, rewrites=len(done), misses=tuple(misses), note=note)


def _layers(program: Program, options: Options) -> tuple[dict[Kind, list[Node]], list[Miss]]:
    """Give the linear layers that a kernel could compute, and those that a scheme waits for."""
    found: dict[Kind, list[Node]] = {}
    misses: list[Miss] = []
    scorers = _scorers(program)
    for node in program.gm.graph.nodes:
        if node.op != "call_function" or node.target not in _TARGETS:
            continue
        path, matrix = module_path(node), tensor_of(_inputs(node)[1])
        scheme = options.linear_scheme(path)
        if scheme and (node in scorers or matrix is None or matrix.shape[0] < linear.GRAIN):
            scheme = None
        why = _why_not(node)
        if not why and matrix is not None and (scheme or matrix.dtype in linear.DTYPES):
            found.setdefault((matrix.dtype, scheme), []).append(node)
        elif why and scheme:
            misses.append(Miss(where=path, why=f"not in {scheme}: {why}", fallback=True))
    return found, misses


def _scorers(program: Program) -> set[Node]:
    """Give the layers whose outputs choose experts or weigh them, with no product in between."""
    nodes = program.nodes()
    waiting = [nodes[name] for one in program.blocks for name in (one.ids, one.weights)]
    waiting += [node for node in nodes.values() if op_name(node) == "topk"]  # blocks not found
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += () if op_name(node) in _PRODUCTS else node.all_input_nodes
    return seen


def _why_not(node: Node) -> str:
    """Say why no kernel of ours reads a linear layer's tensors; empty if one does."""
    x, weight, bias = _inputs(node)
    tensors = [tensor_of(one) for one in (x, weight, bias, node) if one is not None]
    matrix = tensor_of(weight)
    if matrix is None or not is_parameter(weight):
        return "its weight is computed, and may have another layout when the graph runs"
    if any(one is None or is_traceable_wrapper_subclass(one) for one in tensors):
        return "its tensors are not plain"
    if not all(one is not None and one.is_cpu for one in tensors):
        return "native kernels run on CPUs"
    if not all(one is not None and one.dtype == matrix.dtype for one in tensors):
        return "its tensors have several dtypes"  # autocast changes the result's
    return "" if linear.reads(matrix) else "its rows are not contiguous"


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

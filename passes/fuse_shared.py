"""Have each block's kernel add the shared expert's output, on GPUs.

Needs: blocks, lowerings.  Adds: nothing.  Graph: the experts' call takes what was added to it.

    out = moecc.experts(hidden, ids, weights, ...)
    mlp = linear(silu(linear(hidden)) * linear(hidden))
    total = out + gate * mlp
→
    mlp = linear(silu(linear(hidden)) * linear(hidden))
    total = moecc.experts(hidden, ids, weights, ..., shared=mlp, shared_scale=gate)

The last launch of the experts adds it where it stores the sum over k, with no launch, reads and
writes of its own. Bits stay those of separate operators (`codegen/kernels/shared.py`).
"""

from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from moecc.passes.build import Builder
from moecc.passes.describe_blocks import SURPRISES
from moecc.passes.ir import Outcome, Program
from moecc.passes.options import Options
from moecc.passes.pattern import mutates
from moecc.passes.router.values import Values, plain_name, tensor, width
from moecc.passes.shared import read_gate, read_shared
from moecc.passes.sizes import same_shape

_VIEWS = {"to", "view", "reshape", "contiguous", "flatten", "type_as"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sum:
    """A sum of what a call gives and a shared expert's output."""

    between: tuple[Node, ...]
    """Views of the call's result, in order, that nothing else reads."""
    add: Node
    shared: Node
    gate: Node | None
    """[.., 1], which scales `shared`."""


def fuse_shared(program: Program, options: Options) -> Outcome:
    """Move every shared expert that is described into its block's call."""
    kernels = {one.block: one.kernel for one in program.lowerings}
    if not any(one.startswith("triton") for one in kernels.values()):
        return Outcome(program=program, note="off: no kernel here adds them")
    nodes, values = program.nodes(), Values(program.gm.graph)
    found: dict[str, _Sum] = {}
    for block in program.blocks:
        call = nodes[block.output]
        if not kernels.get(block.path, "").startswith("triton") or call.kwargs.get("shared"):
            continue
        if block.shared is None or call.target is not torch.ops.moecc.experts.default:
            continue
        with suppress(*SURPRISES):  # something is written in place, or of no usual kind
            if (total := _sum(values, nodes[block.hidden], call)) is not None:
                found[block.output] = total
    fused = {
        name: _fuse(nodes[name], total, nodes[name].meta["example_value"].shape[-1]).name
        for name, total in found.items()
    }
    blocks = [
        replace(block, output=fused.get(block.output, block.output)) for block in program.blocks
    ]
    note = f"{len(fused)} of {sum(one.shared is not None for one in blocks)} shared experts"
    done = replace(program, blocks=tuple(blocks))
    return Outcome(program=done, rewrites=len(fused), note=note)


def _sum(values: Values, hidden: Node, call: Node) -> _Sum | None:
    """Find where a shared expert is added to what a call gives, and to nothing else of it."""
    between: list[Node] = []
    node = call
    while len(node.users) == 1:
        (user,) = node.users
        name = plain_name(user)
        if name in _VIEWS and user.args[0] is node and _dtype(user) == _dtype(call):
            between.append(user)
            node = user
            continue
        if name != "add" or len(user.args) != 2 or user.kwargs:
            return None
        left, right = user.args
        other = right if left is node else left
        if not isinstance(other, Node) or (mutates(user) and left is not node):
            return None
        return _read(values, tuple(between), user, other, values.plain(hidden), call)
    return None


def _read(
    values: Values, between: tuple[Node, ...], add: Node, other: Node, hidden: Node, call: Node
) -> _Sum | None:
    """Take what is added apart; None if it is no shared expert of the call's shape and dtype."""
    inputs = (*call.all_input_nodes, other)
    ours, theirs = tensor(add), tensor(other)
    alike = ours is not None and theirs is not None and same_shape(ours.shape, theirs.shape)
    if not alike or not _dtype(other) == _dtype(call) == _dtype(add):
        return None
    if any(values.at(one, add) is not values.at(one, call) for one in inputs):
        return None
    shared = read_shared(values, other, hidden, call)
    if shared is None or shared.unknown:
        return None
    if shared.gate and plain_name(other) == "mul":
        _, gate, mlp = read_gate(values, other, hidden)
        if _dtype(gate) == _dtype(mlp) == _dtype(call) and width(mlp) == width(other):
            return _Sum(between=between, add=add, shared=mlp, gate=gate)
    return _Sum(between=between, add=add, shared=other, gate=None)


def _dtype(node: Node) -> torch.dtype | None:
    value = tensor(node)
    return None if value is None else value.dtype


def _fuse(call: Node, found: _Sum, width: int) -> Node:
    """Put the call where the sum was."""
    build = Builder(call.graph, found.add)
    gate = None if found.gate is None else build.matrix(found.gate, 1)
    kwargs = {**call.kwargs, "shared": build.matrix(found.shared, width), "shared_scale": gate}
    experts = torch.ops.moecc.experts.default
    fused = build.function(experts, *call.args, name="experts", **kwargs)
    result = build.shaped(fused, found.add.meta["example_value"].shape)
    found.add.replace_all_uses_with(result)
    for node in (found.add, *reversed(found.between), call):
        call.graph.erase_node(node)
    return fused

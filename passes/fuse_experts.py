"""Turn each block's experts into one call.

Needs: blocks.  Adds: nothing.  Graph: each block becomes one `moecc.experts` node.

    sort, gather, grouped_mm, chunk, silu, mul, grouped_mm, mul, unsort, sum
→
    moecc.experts(hidden, ids, weights, gate_up, down, None, None, None, kernel)

The node names the torch kernel, so the graph runs as it is; `lower` puts a faster one in its place.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from moecc.codegen import reference
from moecc.codegen.spec import KernelSpec
from moecc.passes.ir import MoeBlock, Outcome, Program
from moecc.passes.options import Options
from moecc.runtime import ops


def fuse_experts(program: Program, options: Options) -> Outcome:
    """Replace every detected block that is not fused yet."""
    found = [block for block in program.blocks if block.interior]
    nodes = dict(program.nodes())
    renamed: dict[str, str] = {}
    blocks: list[MoeBlock] = []
    for block in program.blocks:
        current = _follow(block, renamed)
        if block.interior:
            current = _fuse(program, current, nodes, renamed)
        blocks.append(current)
    return Outcome(program=replace(program, blocks=tuple(blocks)), rewrites=len(found))


def kernel_spec(block: MoeBlock) -> KernelSpec:
    """Say what kernel a block needs."""
    return KernelSpec(
        hidden=block.hidden_size,
        intermediate=block.intermediate,
        experts=block.experts,
        dtype=block.dtype,
        activation=block.activation,
        gated=block.gated,
        interleaved=block.interleaved,
        transposed=block.transposed,
        bias=block.gate_up_bias is not None,
        split=block.up is not None,
        device=block.device,
    )


def _follow(block: MoeBlock, renamed: Mapping[str, str]) -> MoeBlock:
    """Point a block that reads an earlier one at what that one became."""
    inputs = ("hidden", "ids", "weights")
    names = {key: getattr(block, key) for key in inputs}
    return replace(block, **{key: renamed.get(name, name) for key, name in names.items()})


def _fuse(
    program: Program, block: MoeBlock, nodes: dict[str, Node], renamed: dict[str, str]
) -> MoeBlock:
    graph = program.gm.graph
    kernel = reference.emit(kernel_spec(block))
    ops.install(kernel.key, kernel.run)
    old = nodes[block.output]
    inputs = (
        block.hidden, block.ids, block.weights, block.gate_up, block.down,
        block.gate_up_bias, block.down_bias, block.up,
    )  # fmt: skip
    args = [nodes[name] if name is not None else None for name in inputs]
    hidden = nodes[block.hidden].meta["example_value"]
    with graph.inserting_before(old):
        target = torch.ops.moecc.experts.default
        new = graph.create_node("call_function", target, (*args, kernel.key), name="experts")
        new.meta = dict(old.meta, example_value=hidden.new_empty(hidden.shape))
        result = new
        if old.meta["example_value"].dtype != hidden.dtype:  # the model leaves the sum wide
            result = graph.call_method("to", (new, old.meta["example_value"].dtype))
            result.meta = dict(old.meta)
    old.replace_all_uses_with(result)
    renamed[old.name], nodes[result.name] = result.name, result
    graph.erase_node(old)
    _erase_interior([nodes[name] for name in block.interior], graph)
    return replace(block, output=new.name, interior=())


def _erase_interior(interior: list[Node], graph: torch.fx.Graph) -> None:
    """Drop what only served the block, in-place writes too, which dead-code removal must keep."""
    left = set(interior)
    while dead := [node for node in left if not node.users]:
        for node in dead:
            graph.erase_node(node)
        left.difference_update(dead)

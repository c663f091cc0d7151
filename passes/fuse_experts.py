"""Turn each block's experts into one call.

Needs: blocks.  Adds: nothing.  Graph: each block becomes one `moecc.experts` node.

    sort, gather, grouped_mm, chunk, silu, mul, grouped_mm, mul, unsort, sum
→
    moecc.experts(hidden, ids, weights, gate_up, down, None, None, None, None, kernel)

Experts that are modules have a matrix each: `moecc.experts.apart` takes those in lists.

Around the call go what the model's way of writing it needs: hidden seen as [T, H] and the result in
the model's shape, a gather where weights are dense gates, and where they scale the experts' input

    rows = (hidden[:, None] * weights[..., None]).reshape(T * K, H)
    out  = moecc.experts(rows, ids.reshape(T * K, 1), ones, ...).reshape(T, K, H).sum(1)

The node names the torch kernel, so the graph runs as it is; `lower` puts a faster one in its place.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch.fx import Node

from moecc.codegen import reference
from moecc.codegen.emit import install_kernel
from moecc.codegen.spec import KernelSpec
from moecc.passes.build import Builder
from moecc.passes.ir import MoeBlock, Outcome, Program
from moecc.passes.options import Options
from moecc.passes.parameters import stacked_parameters
from moecc.passes.pattern import mutates
from moecc.passes.routes import build_routes, follow_route


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
        down_transposed=block.down_transposed,
        bias=block.gate_up_bias is not None,
        split=block.up is not None,
        device=block.device,
    )


def _follow(block: MoeBlock, renamed: Mapping[str, str]) -> MoeBlock:
    """Point a block that reads an earlier one at what that one became."""
    inputs = ("hidden", "ids", "weights", "onto")
    names = {key: getattr(block, key) for key in inputs}
    routes = tuple(follow_route(route, renamed) for route in block.routes)
    followed = {key: renamed.get(name, name) for key, name in names.items()}
    return replace(block, routes=routes, **followed)


def _fuse(
    program: Program, block: MoeBlock, nodes: dict[str, Node], renamed: dict[str, str]
) -> MoeBlock:
    """Put the call and what it needs before the block's last node, and take that node's place."""
    graph = program.gm.graph
    kernel = reference.emit(kernel_spec(block))
    install_kernel(kernel, "torch")
    old = nodes[block.output]
    build = Builder(graph, old)
    tokens = chosen = _tokens(build, block, nodes)
    if block.weighs == "input":
        tokens = _weighed_rows(build, block.hidden_size, *tokens)
    bias = _gate_up_bias(build, block, nodes)
    names = (block.gate_up, block.down, block.up)
    gate_up, down, up = (nodes[name] if name is not None else None for name in names)
    parts = [stacked_parameters(one) for one in (gate_up, down, up) if one is not None]
    if apart := all(parts):
        gate_up, down, up = (*parts, None)[:3]
    down_bias, learned = (_bias(build, name, nodes) for name in (block.down_bias, block.learned))
    inputs = (*tokens, gate_up, down, bias, down_bias, up, learned, kernel.key)
    experts = torch.ops.moecc.experts.apart if apart else torch.ops.moecc.experts.default
    call = build.function(experts, *inputs, name="experts")
    result = _result(build, block, call, old, nodes)
    if mutates(old):  # the model goes on with the tensor that it wrote to
        written, new = cast(Node, old.args[0]), {old, result}
        written.replace_all_uses_with(result, lambda user: user not in new)
    old.replace_all_uses_with(result)
    renamed[old.name], nodes[result.name] = result.name, result
    graph.erase_node(old)
    _erase_interior([nodes[name] for name in block.interior], graph)
    hidden, ids, weights = (node.name for node in (tokens[0], *chosen[1:]))
    fused = replace(block, hidden=hidden, ids=ids, weights=weights, output=call.name, onto=None)
    biases = [one.name if one is not None else None for one in (bias, down_bias)]
    fused = replace(fused, gate_up_bias=biases[0], up_bias=None, down_bias=biases[1])
    if apart:
        first = dict(zip(("gate_up", "down", "up"), (one[0].name for one in parts), strict=False))
        fused = replace(fused, **first)
    return replace(fused, interior=(), dense_gates=False, wraps=False, routes=())


def _tokens(build: Builder, block: MoeBlock, nodes: Mapping[str, Node]) -> tuple[Node, Node, Node]:
    """Give hidden [T, H], ids [T, K] and weights [T, K]."""
    hidden = build.matrix(nodes[block.hidden], block.hidden_size)
    if block.routes:
        dtype = nodes[block.output].meta["example_value"].dtype
        return hidden, *build_routes(build, block.routes, block.experts, dtype, nodes)
    ids = build.matrix(nodes[block.ids], block.active)
    if ids.meta["example_value"].dtype != torch.int64:
        ids = build.method("to", ids, torch.int64)
    if block.wraps:
        ids = build.function(torch.remainder, ids, block.experts)
    if not block.dense_gates:
        return hidden, ids, build.matrix(nodes[block.weights], block.active)
    gates = build.matrix(nodes[block.weights], block.experts)
    return hidden, ids, build.method("gather", gates, 1, ids)


def _weighed_rows(
    build: Builder, width: int, hidden: Node, ids: Node, weights: Node
) -> tuple[Node, Node, Node]:
    """Scale the tokens themselves: T*K of them, each with one choice of weight 1."""
    columns = build.method("unsqueeze", weights, -1)
    rows = build.function(torch.mul, build.method("unsqueeze", hidden, 1), columns)
    rows, ids = build.method("reshape", rows, -1, width), build.method("reshape", ids, -1, 1)
    return rows, ids, build.function(torch.ones_like, ids, dtype=torch.float32)


def _bias(build: Builder, name: str | None, nodes: Mapping[str, Node]) -> Node | None:
    """Give a bias as [E, outputs]; a model may keep it as [E, 1, outputs]."""
    if name is None:
        return None
    return build.matrix(nodes[name], nodes[name].meta["example_value"].shape[-1])


def _gate_up_bias(build: Builder, block: MoeBlock, nodes: Mapping[str, Node]) -> Node | None:
    bias, up_bias = (_bias(build, name, nodes) for name in (block.gate_up_bias, block.up_bias))
    if bias is None or up_bias is None:
        return bias
    return build.function(torch.cat, [bias, up_bias], dim=-1)


def _result(
    build: Builder, block: MoeBlock, call: Node, old: Node, nodes: Mapping[str, Node]
) -> Node:
    """Give what the call yields the dtype and the shape of the model's own sum."""
    wanted = old.meta["example_value"]
    result = call
    if result.meta["example_value"].dtype != wanted.dtype:  # the model leaves the sum wide
        result = build.method("to", result, wanted.dtype)
    if block.weighs == "input":
        terms = build.method("reshape", result, -1, block.active, block.hidden_size)
        result = build.method("sum", terms, dim=1)
    result = build.shaped(result, wanted.shape)
    return result if block.onto is None else build.function(torch.add, nodes[block.onto], result)


def _erase_interior(interior: list[Node], graph: torch.fx.Graph) -> None:
    """Drop what only served the block, in-place writes too, which dead-code removal must keep."""
    left = set(interior)
    while dead := [node for node in left if not node.users]:
        for node in dead:
            graph.erase_node(node)
        left.difference_update(dead)

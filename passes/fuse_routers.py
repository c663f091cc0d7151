"""Turn each router on a GPU into one call, from its logits to ids and weights.

Needs: blocks.  Adds: lowerings.  Graph: each router that a kernel can compute becomes one
`moecc.choose_experts` node.

    scores = logits.sigmoid()
    biased = scores + bias
    best = biased.view(T, 8, 32).topk(2).values.sum(-1).topk(4).indices
    ...                                                  # mask the other groups
    ids = biased.masked_fill(~mask, -inf).topk(8).indices
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
    moecc.experts(hidden, ids, weights, ...)
→
    choice = moecc.choose_experts(logits, bias, 8, float32, "triton: sigmoid + bias, ...")
    moecc.experts(hidden, choice[0], choice[1], ...)

A router that no kernel computes stays as the model wrote it, which is a miss that says why. So do
all with `kernels="torch"`; which kernel could take their place is told (`moecc kernels`).
"""

import operator
from dataclasses import replace

import torch
from torch.fx import Node

from moecc.codegen.emit import choose_router
from moecc.passes.build import Builder
from moecc.passes.describe_blocks import SURPRISES
from moecc.passes.ir import Lowering, Miss, MoeBlock, Outcome, Program
from moecc.passes.options import Options
from moecc.passes.router.bind import Bound, bind_router
from moecc.passes.router.values import Unreadable, Values
from moecc.passes.source import source_line
from moecc.runtime.errors import UnsupportedSpec
from moecc.runtime.routers import install


def fuse_routers(program: Program, options: Options) -> Outcome:
    """Bind routers, and replace those of blocks on devices whose kernels compute them."""
    nodes, values = program.nodes(), None
    misses: list[Miss] = []
    lowerings: list[Lowering] = []
    blocks: list[MoeBlock] = []
    replaced: list[tuple[Node, Bound, str]] = []
    for block in program.blocks:
        blocks.append(block)
        emit = choose_router(block.device, options.kernels)
        if block.router_kernel or (emit is None and options.kernels != "torch"):
            continue
        values = values or Values(program.gm.graph)
        call = nodes[block.output]
        try:
            bound = bind_router(values, nodes[block.ids], nodes[block.weights], call)
            blocks[-1] = replace(block, router_spec=bound.spec)
            kernel = emit(bound.spec) if emit is not None else None
        except (UnsupportedSpec, *SURPRISES) as error:
            if emit is not None:
                misses.append(_miss(block, error))
            continue
        if kernel is not None:
            install(kernel.key, kernel.run)
            replaced.append((call, bound, kernel.key))
            where = f"{block.path} router"
            lowerings.append(Lowering(block=where, kernel=kernel.key, source=kernel.source))
            blocks[-1] = replace(blocks[-1], router_kernel=kernel.key)
    names = {call.name: _replace(call, bound, key) for call, bound, key in replaced}
    for place, block in enumerate(blocks):
        if block.output in names:
            ids, weights = names[block.output]
            blocks[place] = replace(block, ids=ids, weights=weights)
    done = replace(program, blocks=tuple(blocks), lowerings=(*program.lowerings, *lowerings))
    return Outcome(program=done, rewrites=len(replaced), misses=tuple(misses))


def _miss(block: MoeBlock, error: Exception) -> Miss:
    why = f"its router stays torch's: {str(error) or 'it is not understood'}"
    if not isinstance(error, Unreadable):
        return Miss(where=block.path, why=why)
    return Miss(where=block.path, why=why, node=error.node.name, source=source_line(error.node))


def _replace(call: Node, bound: Bound, kernel: str) -> tuple[str, str]:
    """Put the choice before the first that reads it, and erase what it replaces.

    Returns the names of ids and weights.
    """
    readers, spec = {one for one, _, _ in bound.readers}, bound.spec
    first = next(node for node in call.graph.nodes if node in readers)
    build = Builder(call.graph, first)
    logits, bias = build.matrix(bound.logits, spec.experts), bound.bias
    if bias is not None and bias.meta["example_value"].dim() > 1:
        bias = build.method("reshape", bias, -1)
    choice = build.function(
        torch.ops.moecc.choose_experts.default,
        *(logits, bias, spec.active, spec.weights_dtype, kernel),
        name="choice",
    )
    results = [build.function(operator.getitem, choice, place) for place in (0, 1)]
    for reader, node, place in bound.readers:
        reader.replace_input_with(node, results[place])
    for node in reversed(bound.inside):
        call.graph.erase_node(node)
    ids, weights = results
    return ids.name, weights.name

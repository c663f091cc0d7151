"""Start reading the experts that later layers will likely choose.

Needs: placements.  Adds: prefetches.  Graph: each lent block predicts those that follow, and
the tokens predict the first.

Layer l+1 chooses its experts from the residual stream after its attention. Without what layer l's
experts and layer l+1's attention add to it, the same stream is known before layer l's experts run.
So the cone from there to layer l+1's scores, with norm and router, is cloned onto layer l's stream:

    r = add(x, attention(x))                         # layer l
    out = moecc.experts(norm(r), ids, ...)
    r1 = add(x1, attention1(x1))                     # layer l+1, x1 = add(r, out)
    scores1 = linear(norm1(r1), router1)
→
    guess = moecc.prefetch(linear(norm1(r), router1), gate_up1, K, 1)
    out = moecc.experts(norm(r), ids, ..., after=[guess])

Nothing is computed before the first block that its router could read. What it chose for the same
tokens the last time is a guess that is there as soon as the tokens are:

    x = embedding(tokens, table)
→
    guess = moecc.recall(tokens, gate_up0, K)
    x = embedding(tokens, table)

(Eliseev and Mazur, "Fast Inference of MoE Language Models with Offloading", 2023, guess with the
next layer's gate; here the cone is cut from the graph, for any router.) Predictions change no
output. Whether one is worth its bytes is priced when it is made (`moecc.runtime.offload.governor`).
"""

from dataclasses import replace

import torch
from torch.fx import Node

from moecc.passes.cones import ancestors, cone, residual_of
from moecc.passes.ir import Miss, MoeBlock, Outcome, Prefetch, Program
from moecc.passes.options import Options
from moecc.passes.pattern import op_name

AUTO = 1
"""Layers ahead that `lookahead="auto"` predicts."""


def insert_prefetch(program: Program, options: Options) -> Outcome:
    """Clone the routers of blocks whose experts are lent onto earlier residual streams."""
    lent = {one.block for one in program.placements if one.home == "lent"}
    blocks = [block for block in program.blocks if block.path in lent]
    if not blocks:
        return Outcome(program=program, note="nothing to fetch: every expert is resident")
    if program.prefetches:
        return Outcome(program=program, note="prefetches are in place already")
    reach = AUTO if options.lookahead == "auto" else options.lookahead
    if reach == 0:
        return Outcome(program=program, note="off: lookahead is 0")
    nodes = dict(program.nodes())
    misses: list[Miss] = []
    made: list[Prefetch] = []
    streams = [residual_of(nodes[block.hidden], nodes[block.output]) for block in blocks]
    for place, target in enumerate(blocks[1:], 1):
        for distance in range(1, min(reach, place) + 1):
            source, stream = blocks[place - distance], streams[place - distance]
            why = _predict(source, stream, target, streams[place], distance, nodes)
            if why:
                misses.append(Miss(where=target.path, why=f"no prefetch: {why}"))
                break
            made.append(Prefetch(block=target.path, at=source.path, distance=distance))
    note = f"{len(made)} predictions of what follows, up to {reach} layers ahead"
    if _recall(blocks[0], nodes):
        made.append(Prefetch(block=blocks[0].path, at="tokens", distance=1))
        note += ", and one by the tokens"
    done = replace(program, prefetches=tuple(made))
    return Outcome(program=done, rewrites=len(made), misses=tuple(misses), note=note)


def _predict(
    source: MoeBlock,
    stream: Node | None,
    target: MoeBlock,
    target_stream: Node | None,
    distance: int,
    nodes: dict[str, Node],
) -> str:
    """Clone the target's router onto the source's stream; say why not, or nothing."""
    if stream is None or target_stream is None:
        return "its output is not added to what its router reads"
    scores = _scores(nodes[target.ids], target.experts)
    if scores is None:
        return "its experts are not the top-k of scores"
    experts = nodes[source.output]
    between = cone(scores, target_stream, experts)
    if between is None:
        return "its router reads more than the residual stream"
    if stream not in ancestors(experts):
        return "the stream is not known before the experts run"
    graph = experts.graph
    copies: dict[Node, Node] = {target_stream: stream}
    with graph.inserting_before(experts):
        for node in between:
            copies[node] = graph.node_copy(node, lambda one: copies.get(one, one))
        arguments = (copies[scores], nodes[target.gate_up], target.active, distance)
        guess = graph.call_function(torch.ops.moecc.prefetch.default, arguments)
    _make_before(experts, guess)
    return ""


def _recall(first: MoeBlock, nodes: dict[str, Node]) -> bool:
    """Let the first block recall its tokens: the indices of the largest table behind it."""
    experts = nodes[first.output]
    tables = [one for one in ancestors(experts) if op_name(one) == "embedding"]
    rows = {one: _shape(one.args[1])[0] for one in tables if _shape(one.args[1])}
    if not rows:
        return False
    embedding = max(rows, key=lambda one: rows[one])
    with experts.graph.inserting_before(embedding):
        arguments = (embedding.args[0], nodes[first.gate_up], first.active)
        guess = experts.graph.call_function(torch.ops.moecc.recall.default, arguments)
    _make_before(experts, guess)
    return True


def _make_before(experts: Node, guess: Node) -> None:
    """Have experts wait for a prediction, so that it is neither moved behind them nor dropped."""
    guess.meta["example_value"] = torch.empty(0)
    after = experts.kwargs.get("after")
    known = list(after) if isinstance(after, (list, tuple)) else []
    experts.kwargs = {**experts.kwargs, "after": [*known, guess]}


def _shape(table: object) -> tuple[int, ...]:
    value = table.meta.get("example_value") if isinstance(table, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _scores(ids: Node, experts: int) -> Node | None:
    """Find what the last top-k before the ids was taken of: [.., E]."""
    seen, queue = {ids}, [ids]
    for node in queue:
        if op_name(node) == "topk":
            scores = node.args[0]
            value = scores.meta.get("example_value") if isinstance(scores, Node) else None
            last = value is not None and value.shape[-1] == experts
            return scores if last and isinstance(scores, Node) else None
        for before in node.all_input_nodes:
            if before not in seen:
                seen.add(before)
                queue.append(before)
    return None

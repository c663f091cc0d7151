"""Find the experts of every MoE layer in the graph.

Needs: nothing.  Adds: blocks.  Graph: unchanged.

A block is matched by structure (`passes/styles`): an index tensor that selects among E weight sets,
two products with an activation between them, and a weighted sum back to the tokens. Names of
modules label a report and never decide. What looked like a block and was not is a miss that says
how far the matcher came, where it stopped and why.
"""

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from moecc.passes.activation import Activation, UnreadableActivation, read_activation
from moecc.passes.ir import Miss, MoeBlock, Outcome, Program
from moecc.passes.options import Options
from moecc.passes.pattern import FLOATS, Match, mutates, op_name
from moecc.passes.source import module_path, source_line
from moecc.passes.styles import STYLES
from moecc.passes.styles.style import Style


def detect_moe(program: Program, options: Options) -> Outcome:
    """Match every style at every node that could end a block."""
    if program.blocks:
        return Outcome(program=program, note="blocks are known already")
    blocks: list[MoeBlock] = []
    misses: list[Miss] = []
    for node in program.gm.graph.nodes:
        for style in STYLES:
            if op_name(node) != style.anchor:
                continue
            found = _match(style, node)
            if isinstance(found, MoeBlock):
                blocks.append(found)
            elif found is not None:
                misses.append(found)
    if program.trains and blocks:
        why = "gradients are wanted, and fused experts have none; run under torch.no_grad()"
        misses += [Miss(where=block.path, why=why, fallback=True) for block in blocks]
        blocks = []
    return Outcome(program=replace(program, blocks=tuple(blocks)), misses=tuple(misses))


def _match(style: Style, node: Node) -> MoeBlock | Miss | None:
    try:
        return _attempt(style, node)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        why = f"the {style.name} matcher cannot read it: {type(error).__name__}: {error}"
        return Miss(where=module_path(node) or node.name, why=why, fallback=True)


def _attempt(style: Style, node: Node) -> MoeBlock | Miss | None:
    match = Match()
    if not match.find(style.output, node):
        return _miss(style, node, match) if match.reached >= style.near else None
    try:
        activation = read_activation(match.bindings["activated"])
    except UnreadableActivation as error:
        why = f"the activation is not one that kernels compute: {error}"
        return Miss(where=module_path(node) or node.name, why=why, fallback=True)
    if not match.find(style.first, activation.rows):
        return _miss(style, node, match)
    interior = {*match.nodes, *activation.nodes} - {node}
    why = _unsafe(interior, node) or _misfit(match.bindings, activation)
    if why:
        return Miss(where=module_path(node) or node.name, why=why, fallback=True)
    return _block(style, node, match.bindings, activation, interior)


def _miss(style: Style, node: Node, match: Match) -> Miss:
    stop = match.stopped_at or node
    line = source_line(stop)
    why = (
        f"matched {match.reached} nodes of the {style.name} style and stopped at {stop.name}"
        f"{f' ({line})' if line else ''}: {match.reason}"
    )
    return Miss(where=module_path(node) or node.name, why=why, fallback=True)


def _unsafe(interior: set[Node], output: Node) -> str:
    """Find what a single fused call would not give: a value, or the order of a write."""
    for one in interior:
        if stranger := next((user for user in one.users if user not in {*interior, output}), None):
            return f"{one.name}, in the middle of the block, is used by {stranger.name} too"
    waiting = set(interior)
    node = output
    while waiting:
        node = node.prev
        waiting.discard(node)
        if mutates(node) and node not in interior:
            return f"{node.name} changes {node.args[0]} in place in the middle of the block"
    return ""


def _misfit(bindings: dict[str, Any], activation: Activation) -> str:
    """Check dtypes, layouts and shapes; say what does not fit."""
    return _misfit_weights(bindings) or _misfit_shapes(bindings, activation)


def _misfit_weights(bindings: dict[str, Any]) -> str:
    for key in ("gate_up", "down"):
        argument = bindings[key].meta.get("grapharg")
        value: Any = _value(bindings[key]) if argument is None else argument.example
        if type(value) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
            return f"expert weights are {type(value).__name__}, which moecc does not read"
        if value.stride(-1) != 1:
            return f"{key} has strides {value.stride()}; kernels read rows, so call .contiguous()"
    dtypes = {_value(bindings[name]).dtype for name in ("gate_up", "down")}
    if len(dtypes) > 1 or not dtypes.issubset(FLOATS):
        return f"expert weights are {sorted(map(str, dtypes))}, not one floating-point dtype"
    if (bindings.get("gate_up_bias") is None) != (bindings.get("down_bias") is None):
        return "only one of the two products has a bias"
    if type(_value(bindings["hidden"])) is not FakeTensor:
        return "the block is inside a transformation such as vmap"
    return ""


def _misfit_shapes(bindings: dict[str, Any], activation: Activation) -> str:
    shapes = {name: _shape(bindings[name]) for name in ("hidden", "ids", "gate_up", "down")}
    hidden, ids, gate_up, down = shapes.values()
    if any(len(shape) != size for shape, size in zip(shapes.values(), (2, 2, 3, 3), strict=True)):
        return f"shapes are not hidden [T, H], ids [T, K], weights [E, ., .]: {shapes}"
    turned = bool(bindings.get("gate_up_input_major"))
    if turned != bool(bindings.get("down_input_major")):
        return "the two products store their weights in different layouts"
    rows, width = (gate_up[2], gate_up[1]) if turned else (gate_up[1], gate_up[2])
    out, inner = (down[2], down[1]) if turned else (down[1], down[2])
    if (width, out) != (hidden[1], hidden[1]) or rows != (2 * inner if activation.gated else inner):
        return f"weights [E, ., .] do not chain back to the hidden size: {shapes}"
    if gate_up[0] != down[0] or bindings.get("active", ids[1]) != ids[1]:
        return f"the number of experts or of choices differs between parts: {shapes}"
    if "bins" in bindings and (bindings["bins"], bindings["last"]) != (down[0], down[0] - 1):
        return "tokens are counted for another number of experts than there are weights"
    if "terms" in bindings and _shape(bindings["terms"])[1:] != (ids[1], hidden[1]):
        return "the sum does not run over a token's experts"
    weights, dtype = _value(bindings["weights"]), _value(bindings["down"]).dtype
    if not weights.is_floating_point() or tuple(weights.shape)[1:] != (ids[1],):
        return f"routing weights are {weights.dtype} {tuple(weights.shape)}, not [T, K] of floats"
    for key, outputs in (("gate_up_bias", rows), ("down_bias", out)):
        if bindings.get(key) is None:
            continue
        bias = _value(bindings[key])
        if tuple(bias.shape) != (down[0], outputs) or bias.dtype != dtype:
            return f"{key} is {bias.dtype} {tuple(bias.shape)}, not {dtype} [E, {outputs}]"
    return ""


def _block(
    style: Style,
    node: Node,
    bindings: dict[str, Any],
    activation: Activation,
    interior: set[Node],
) -> MoeBlock:
    down, hidden = _shape(bindings["down"]), _shape(bindings["hidden"])
    turned = bool(bindings.get("down_input_major"))
    weights = _value(bindings["down"])

    def name(key: str) -> str | None:
        return bindings[key].name if bindings.get(key) is not None else None

    return MoeBlock(
        path=module_path(node) or node.name,
        style=style.name,
        source=source_line(node),
        hidden=bindings["hidden"].name,
        ids=bindings["ids"].name,
        weights=bindings["weights"].name,
        gate_up=bindings["gate_up"].name,
        down=bindings["down"].name,
        gate_up_bias=name("gate_up_bias"),
        down_bias=name("down_bias"),
        output=node.name,
        interior=tuple(sorted(part.name for part in interior)),
        hidden_size=int(hidden[1]),
        intermediate=int(down[1] if turned else down[2]),
        experts=int(down[0]),
        active=int(_shape(bindings["ids"])[1]),
        dtype=weights.dtype,
        device=weights.device.type,
        activation=activation.expr,
        gated=activation.gated,
        interleaved=activation.interleaved,
        transposed=turned,
    )


def _value(node: Node) -> torch.Tensor:
    return node.meta["example_value"]


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(_value(node).shape)

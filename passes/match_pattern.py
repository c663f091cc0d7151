"""Match a style's two patterns around the activation."""

from dataclasses import replace
from typing import Any

from torch.fx import Node

from moecc.passes.activation import Activation, UnreadableActivation, read_activation
from moecc.passes.axes import shape_of, tensor_of
from moecc.passes.found import Found, NearMiss
from moecc.passes.pattern import Match
from moecc.passes.sizes import known, same, same_shape
from moecc.passes.source import source_line
from moecc.passes.styles.style import Style


def match_pattern(style: Style, node: Node) -> Found | None:
    """Match at the node that could end a block; None if it is far from one.

    Raises `NearMiss` saying how far the match came, where it stopped and why.
    """
    match = Match()
    if not match.find(style.output, node):
        if match.reached < style.near:
            return None
        raise _stopped(style, node, match)
    try:
        activation = read_activation(match.bindings["activated"])
    except UnreadableActivation as error:
        raise NearMiss(node, f"the activation is not one that kernels compute: {error}") from error
    up = _find_up(style, node, match, activation)
    if not match.find(style.first, activation.rows):
        raise _stopped(style, node, match)
    if why := _misfit(match.bindings):
        raise NearMiss(node, why)
    found = _found(node, match, activation)
    if up is None:
        return found
    if bool(up.bindings.get("gate_up_input_major")) != found.transposed:
        raise NearMiss(node, "gate and up are stored in different layouts")
    same_inputs = all(up.bindings[name] is match.bindings[name] for name in ("hidden", "ids"))
    if not same_inputs:
        raise NearMiss(node, "gate and up are products of different tokens or experts")
    return replace(
        found,
        up=up.bindings["gate_up"],
        up_bias=up.bindings.get("gate_up_bias"),
        work=found.work | frozenset(up.nodes),
    )


def _find_up(style: Style, node: Node, match: Match, activation: Activation) -> Match | None:
    """Match the first product once more for an up that is a product of its own."""
    if activation.up_rows is None:
        return None
    up = Match(bindings=dict(match.bindings))
    if not up.find(style.first, activation.up_rows):
        raise _stopped(style, node, up)
    return up


def _stopped(style: Style, node: Node, match: Match) -> NearMiss:
    stop = match.stopped_at or node
    line = source_line(stop)
    why = (
        f"matched {match.reached} nodes of the {style.name} style and stopped at {stop.name}"
        f"{f' ({line})' if line else ''}: {match.reason}"
    )
    return NearMiss(node, why)


def _misfit(bindings: dict[str, Any]) -> str:
    """Say what does not fit of the numbers that the patterns bind."""
    names = ("hidden", "ids", "weights", "gate_up", "down")
    shapes = {name: shape_of(bindings[name]) for name in names}
    hidden, ids, weights, gate_up, down = shapes.values()
    if [*map(len, shapes.values())] != [2, 2, 2, 3, 3]:
        return f"shapes are not hidden [T, H], ids and weights [T, K], weights [E, ., .]: {shapes}"
    if not same(gate_up[0], down[0]) or not same(bindings.get("active", ids[1]), ids[1]):
        return f"the number of experts or of choices differs between parts: {shapes}"
    if "bins" in bindings and (bindings["bins"], bindings["last"]) != (down[0], down[0] - 1):
        return "tokens are counted for another number of experts than there are weights"
    if "terms" in bindings and not same_shape(shape_of(bindings["terms"])[1:], (ids[1], hidden[1])):
        return "the sum does not run over a token's experts"
    value = tensor_of(bindings["weights"])
    floating = value is not None and value.is_floating_point()
    if not floating or not same(weights[1], ids[1]):
        return f"routing weights are {value} {weights}, not [T, K] of floats"
    return ""


def _found(node: Node, match: Match, activation: Activation) -> Found:
    bindings = match.bindings
    active = known(shape_of(bindings["ids"])[1])
    if active is None:
        raise NearMiss(node, "the number of choices changes from call to call")
    return Found(
        hidden=bindings["hidden"],
        ids=bindings["ids"],
        weights=bindings["weights"],
        gate_up=bindings["gate_up"],
        down=bindings["down"],
        gate_up_bias=bindings.get("gate_up_bias"),
        down_bias=bindings.get("down_bias"),
        output=node,
        active=active,
        activation=activation.expr,
        gated=activation.gated,
        interleaved=activation.interleaved,
        transposed=bool(bindings.get("gate_up_input_major")),
        down_transposed=bool(bindings.get("down_input_major")),
        work=frozenset({*match.nodes, *activation.nodes} - {node}),
    )

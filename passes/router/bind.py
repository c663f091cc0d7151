"""Say what kernel computes a router, and between which nodes: a description made executable.

Only what a `RouterSpec` can say to the last comparison is bound; the rest raises `Unreadable`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch.fx import Node

from moecc.codegen.router_spec import FUNCTIONS, RouterSpec
from moecc.passes.cones import ancestors, descendants
from moecc.passes.pattern import mutates
from moecc.passes.router.chain import Trace
from moecc.passes.router.factors import is_learned, join
from moecc.passes.router.read import read_parts
from moecc.passes.router.steps import Bias, Function, Groups, Normalise, Scale, Step, TopK
from moecc.passes.router.values import Unreadable, Values, plain_name, tensor, width

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A router's kernel in the place of nodes."""

    spec: RouterSpec
    logits: Node
    """[.., E]"""
    bias: Node | None
    """[E], or that with more dimensions of one."""
    inside: tuple[Node, ...]
    """What makes ids and weights of them, these two included, in the graph's order."""
    readers: tuple[tuple[Node, Node, int], ...]
    """What reads which of them from outside, and finds ids (0) or weights (1) there."""


def bind_router(values: Values, ids: Node, weights: Node, call: Node) -> Bound:
    """Bind what makes a block's `ids` and `weights` as they are at its experts' `call`.

    Raises `Unreadable` at a node with the reason why no kernel computes it.
    """
    ids, weights = values.at(ids, call), values.at(weights, call)
    choice, before, after = read_parts(values, ids, _gates(values, ids, weights), call)
    if before is None or not isinstance(choice.step, TopK):
        raise Unreadable(choice.ids, f"experts are chosen by {choice.step}")
    for trace in (before, after.trace):
        if trace is not None and trace.stopped is not None:
            raise trace.stopped
    shared = before.since(after.taken) if after.taken is not None else None
    if shared is None:
        raise Unreadable(weights, "the weights are not those of the scores that choose")
    logits = before.start
    experts = width(logits)
    if experts is None or experts != width(choice.scores):
        raise Unreadable(logits, "only some of the logits are experts'")
    spec = RouterSpec(
        experts=experts,
        active=choice.step.k,
        dtype=_dtype(values, before, ids),
        weights_dtype=_float(weights),
    )
    spec = _with_scores(spec, join(before.steps[:shared]), join(before.steps[shared:]), logits)
    spec = _with_weights(spec, after.steps, weights)
    bias = _bias(values, before) if spec.bias else None
    inside = _inside(logits, ids, weights, call)
    readers = _readers(values, inside, (ids, weights))
    for given in (logits, bias):
        if given is not None and any(values.at(given, one) is not given for one, _, _ in readers):
            raise Unreadable(given, "it is written to before the experts run")
    return Bound(spec=spec, logits=logits, bias=bias, inside=inside, readers=readers)


def _gates(values: Values, ids: Node, weights: Node) -> Node:
    """Give the gates [T, E] that weights were gathered of (`fuse_experts`), or the weights.

    Scores that nothing happened to since the choice are gathered as well, and no gates.
    """
    if plain_name(weights) != "gather" or values.plain_operand(weights, 2, "index") is not ids:
        return weights
    gates = values.plain_operand(weights, 0)
    return gates if isinstance(gates, Node) and ids in ancestors(gates) else weights


def _with_scores(
    spec: RouterSpec, taken: Sequence[Step], more: Sequence[Step], node: Node
) -> RouterSpec:
    """Add the steps up to the scores that weights are taken of, and those the choice sees only."""
    match taken:
        case [Function(name), *rest] if name in FUNCTIONS:
            spec = replace(spec, scores=name)
        case rest:
            pass
    match [*rest, *more]:
        case []:
            return spec
        case [Bias()]:
            spec, groups = replace(spec, bias=True), None
        case [Bias(), Groups() as groups]:
            spec = replace(spec, bias=True)
        case [Groups() as groups]:
            pass
        case steps:
            raise Unreadable(node, f"no kernel knows {' → '.join(map(str, steps))}")
    if spec.bias and rest:
        raise Unreadable(node, "its bias stays in the weights")
    if groups is None:
        return spec
    best = "1" if groups.scored_by == "max" else groups.scored_by.removeprefix("sum of top ")
    size, left = divmod(spec.experts, groups.of)
    if not best.isdecimal() or int(best) > size or left or groups.fill not in (0.0, float("-inf")):
        raise Unreadable(node, f"no kernel knows {groups}")
    # Weights of filled scores would be the fill: there must be enough others above it.
    if rest and (spec.active > groups.kept * size or (groups.fill == 0 and not spec.scores)):
        raise Unreadable(node, f"filled scores may be chosen of {groups}")
    return replace(spec, groups=groups.of, kept=groups.kept, best=int(best), fill=groups.fill)


def _with_weights(spec: RouterSpec, steps: Sequence[Step], node: Node) -> RouterSpec:
    """Add the steps from the chosen scores to the weights."""
    left = list(steps)
    if left and isinstance(first := left[0], Function) and first.name in FUNCTIONS:
        spec, left = replace(spec, weigh=first.name), left[1:]
    if left and isinstance(first := left[0], Normalise) and first.power == 1:
        if not spec.scores and not spec.weigh:  # a sum of magnitudes is another one there
            raise Unreadable(node, "logits are divided by their sum")
        norm = {"epsilon": first.epsilon, "floor": first.floor}
        spec, left = replace(spec, normalised=True, **norm), left[1:]
    if left and isinstance(first := left[0], Scale):
        scale = 1 / first.by if first.divides else first.by
        spec, left = replace(spec, scale=scale), left[1:]
    if left:
        raise Unreadable(node, f"no kernel knows {' → '.join(map(str, left))}")
    return spec


def _dtype(values: Values, before: Trace, ids: Node) -> torch.dtype:
    """Give what scores are rounded to before the choice: where they differ, no kernel does so."""
    inside = ancestors(ids) & descendants(before.start)
    found = {value.dtype for node in inside if (value := tensor(node)) is not None}
    found = {dtype for dtype in found if dtype.is_floating_point}
    logits = _float(before.start)
    if not before.steps and found <= {logits, torch.float32}:
        return logits
    if len(found) != 1 or found - {logits, torch.float32}:
        names = ", ".join(sorted(map(str, found)))
        raise Unreadable(before.start, f"scores of {logits} logits are computed in {names}")
    return found.pop()


def _float(node: Node) -> torch.dtype:
    value = tensor(node)
    if value is None or value.dtype not in _DTYPES:
        raise Unreadable(node, f"it is {'no tensor' if value is None else value.dtype}")
    return value.dtype


def _bias(values: Values, before: Trace) -> Node:
    """Find what the choice's bias is."""
    (add,) = (
        made for step, made in zip(before.steps, before.made, strict=True) if isinstance(step, Bias)
    )
    found = [one for one in add.all_input_nodes if is_learned(values, one)]
    if len(found) != 1 or width(found[0]) != width(add):
        raise Unreadable(add, "its bias is not one value for each expert")
    return found[0]


def _inside(logits: Node, ids: Node, weights: Node, call: Node) -> tuple[Node, ...]:
    """List what lies between, and what writes into that, before the experts run."""
    given, behind = ancestors(logits), descendants(logits)
    nodes = [*takewhile(lambda node: node is not call, logits.graph.nodes)]
    cone = (ancestors(ids) | ancestors(weights)) - given
    writes = [node for node in nodes if node in behind and mutates(node) and node.args]
    while late := [one for one in writes if one.args[0] in cone and one not in cone]:
        cone |= {above for one in late for above in ancestors(one)} - given
    return tuple(node for node in nodes if node in cone & behind)


def _readers(
    values: Values, inside: Sequence[Node], results: tuple[Node, Node]
) -> tuple[tuple[Node, Node, int], ...]:
    """List what reads from outside.

    Raises `Unreadable` at a node of which something reads what the kernel does not give.
    """
    found: list[tuple[Node, Node, int]] = []
    for node in inside:
        for user in node.users:
            if user in inside:
                continue
            if (now := values.at(node, user)) not in results:
                raise Unreadable(node, f"{user.name} reads it too")
            found.append((user, node, results.index(now)))
    return tuple(found)

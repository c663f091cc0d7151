"""Describe the router of a block with capacities: choices side by side, and products of masks.

mask1, mask2 = one_hot(best, E), one_hot(best of the rest, E)
mask1        = mask1 * (position1 < capacity)
weights1     = (scores * mask1).sum(-1)
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch.fx import Node

from moecc.passes.router.chain import Read, guarded, unknown
from moecc.passes.router.choice import Choice, read_choice
from moecc.passes.router.description import Router
from moecc.passes.router.hot import hot_ids, mask_steps
from moecc.passes.router.masks import masked
from moecc.passes.router.read import compose, read_scores
from moecc.passes.router.rows import ids_of_tokens, tokens_of_rows
from moecc.passes.router.steps import Equal, Normalise, Step, TopK
from moecc.passes.router.values import Unreadable, Values, argument, plain_name
from moecc.passes.router.weights import WeightReader, Weights, once

Route = tuple[Node, Sequence[Node]]
"""Ids, and the factors of their weights."""


def read_dispatched(values: Values, hidden: Node, routes: Sequence[Route], output: Node) -> Router:
    """Describe choices whose weights are products; what cannot be read is a step `Unknown`."""
    try:
        hidden = tokens_of_rows(values, values.at(hidden, output))
        choices = [
            read_choice(values, ids_of_tokens(values, values.at(ids, output)), ids)
            for ids, _ in routes
        ]
        choice = _joined(values, choices)
    except Unreadable as error:
        return Router(steps=(unknown(error.node, error.why),))
    before = read_scores(values, choice.scores) if choice.scores is not None else None
    scores = before.nodes if before is not None else frozenset[Node]()
    readers = [
        WeightReader(values=values, choice=one, scores=scores, output=output, over_all=True)
        for one in choices
    ]
    for reader in readers:
        others = [one for one in readers if one is not reader]
        reader.more = (partial(_read_total, others),)
    first, *rest = (
        _read_factors(reader, factors) for reader, (_, factors) in zip(readers, routes, strict=True)
    )
    for one in rest:
        if one.steps != first.steps:
            why = "its weights are made in another way than the first choice's"
            start = one.trace.start if one.trace is not None else output
            first = replace(first, steps=(*first.steps, unknown(start, why)))
    return compose(values, hidden, choice, before, first)


def gates_of_ids(values: Values, ids: Node) -> Node | None:
    """Give gates of which all that are not zero count: `where(gates != 0, arange(E), -1)`."""
    node = values.plain(ids)
    test, numbers = values.plain_operand(node, 0, "condition"), values.plain_operand(node, 1)
    if plain_name(node) != "where" or not isinstance(test, Node) or plain_name(test) != "ne":
        return None
    every = isinstance(numbers, Node) and plain_name(numbers) == "arange"
    gates = values.plain_operand(test, 0)
    found = every and argument(test, 1, "other") == 0 and isinstance(gates, Node)
    return gates if found else None


def route_of_gates(values: Values, gates: Node) -> Route:
    """See gates over all experts as the weights of the one-hot choice that they are made of.

    Raises `Unreadable` if there is none.
    """
    ids = hot_ids(values, gates)
    if ids is None:
        raise Unreadable(gates, "experts are chosen in a way that is not known")
    return ids, (gates,)


def _read_factors(reader: WeightReader, factors: Sequence[Node]) -> Weights:
    """Tell masks among the factors from the one that has the weights."""
    drops: list[Step] = []
    weights: list[Node] = []
    for factor in factors:
        steps = mask_steps(reader.values, factor, reader.choice.ids)
        drops += steps or ()
        weights += [factor] if steps is None else []
    if not weights:
        return Weights(steps=(*once(drops), Equal()), trace=None, taken=None)
    found = reader.read(weights[0])
    odd = [unknown(one, "weights have several factors") for one in weights[1:]]
    return replace(found, steps=once((*drops, *found.steps, *odd)))


def _read_total(others: Sequence[WeightReader], values: Values, node: Node) -> Read | None:
    """Read a weight over the sum of the weights of all choices, each a tensor of its own."""
    source, divisor = values.plain_operand(node, 0), values.plain_operand(node, 1, "other")
    if plain_name(node) != "div" or not isinstance(source, Node) or not isinstance(divisor, Node):
        return None
    epsilon, floor, total = guarded(values, divisor)
    addends = list(_addends(values, total))
    if source not in addends or len(addends) != len(others) + 1:
        return None
    left = [one for one in addends if one is not source]
    for other in (replace(one, more=()) for one in others):
        known = [one for one in left if other.trace_value(one).stopped is None]
        if not known:
            return None
        left.remove(known[0])
    return Normalise(epsilon=epsilon, floor=floor), source


def _addends(values: Values, total: Node) -> Iterator[Node]:
    if plain_name(total) != "add":
        yield total
        return
    for one in (values.plain_operand(total, 0), values.plain_operand(total, 1, "other")):
        if isinstance(one, Node):
            yield from _addends(values, one)


def _joined(values: Values, choices: Sequence[Choice]) -> Choice:
    """See choices of one expert each as the top-k that they are.

    Raises `Unreadable` if one does not choose the best of what the ones before it left.
    """
    first = choices[0]
    for place, choice in enumerate(choices[1:], 1):
        scores = choice.scores
        for earlier in reversed(choices[:place]):
            scores = _rest_of(values, scores, earlier.ids) if scores is not None else None
        if choice.step != TopK(1) or scores is None or scores is not first.scores:
            raise Unreadable(choice.ids, "it is not the best of what earlier choices left")
    if len(choices) == 1:
        return first
    if first.step != TopK(1):
        raise Unreadable(first.ids, "choices of several kinds are side by side")
    return replace(first, step=TopK(len(choices)))


def _rest_of(values: Values, scores: Node, ids: Node) -> Node | None:
    """Give scores before the chosen one was taken out: masked, overwritten, or made zero."""
    if plain_name(scores) == "scatter" and values.plain_operand(scores, 2, "index") is ids:
        return values.plain_operand(scores, 0)
    found = masked(values, scores)
    if found is not None and not found.keeps and hot_ids(values, found.mask) is ids:
        return found.scores
    if plain_name(scores) != "mul":
        return None
    for one, other in ((0, 1), (1, 0)):
        mask = values.plain_operand(scores, other, "other")
        if isinstance(mask, Node) and plain_name(mask) == "sub" and mask.args[0] == 1:
            hot = values.plain_operand(mask, 1, "other")
            if isinstance(hot, Node) and hot_ids(values, hot) is ids:
                return values.plain_operand(scores, one, "other")
    return None

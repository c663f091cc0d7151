"""Say which experts a token gets of a dispatched block, and with which weights.

The model's own ids stay. A choice's weight is what the combine tensor holds for it in any slot: the
factors that do not depend on the slot, read at the chosen expert.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

from torch.fx import Node

from moecc.passes.axes import (
    Axis,
    Dim,
    View,
    leaves,
    size_along,
    through_layout,
)
from moecc.passes.capacity.bounds import around, check_detour, is_positive
from moecc.passes.capacity.dataflow import Dataflow, Unproven, number
from moecc.passes.capacity.slots import (
    Placed,
    check_apart,
    gives_only_slot,
    implied,
    placed,
)
from moecc.passes.capacity.terms import Fact, Reader, Term
from moecc.passes.ir import Route, Seen
from moecc.passes.pattern import op_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """A dispatch and a combine tensor over the same axes."""

    dispatch: View
    entry: Node
    """The product that the dispatch tensor enters."""
    combine: View
    tokens: Dim
    expert: Dim
    slots: Dim
    """What tells the slots of one expert apart: groups of tokens may have some of their own."""

    @property
    def within(self) -> frozenset[Axis]:
        """What tells the slots of one group and expert apart; nothing if there is one slot each."""
        return frozenset(self.slots) - frozenset(self.tokens)

    def resolved(self) -> "Dispatch":
        """Know by now what the axes were split into."""
        tokens, expert, slots = map(leaves, (self.tokens, self.expert, self.slots))
        return replace(self, tokens=tokens, expert=expert, slots=slots)


def routes_of(reader: Reader, block: Dispatch, output: Node) -> tuple[Route, ...]:
    """Give a token's choices, for use at `output`.

    Raises `Unproven` if a slot may be shared, or if something else than tokens may come back.
    """
    while True:
        block = block.resolved()
        known = _split(reader, block)
        try:
            routes = _routes(reader, block, output)
        except Unproven:
            if _split(reader, block) == known:
                raise
        else:
            if _split(reader, block) == known:
                return routes


def _split(reader: Reader, block: Dispatch) -> frozenset[Axis]:
    """Give the axes that were split: if reading splits more, all has to be read again."""
    left = [*block.tokens, *block.expert, *block.slots, *reader.flow.bound.values()]
    found = set[Axis]()
    while left:
        axis = left.pop()
        if axis.parts:
            found.add(axis)
            left += axis.parts
    return frozenset(found)


def _routes(reader: Reader, block: Dispatch, output: Node) -> tuple[Route, ...]:
    reader.flow.read(block.dispatch.node, block.entry)
    reader.flow.read(block.combine.node, output)
    dispatch = reader.flow.stripped(block.dispatch)
    detour = around(reader.flow, dispatch, block.entry)
    dispatch, tested = _tested(reader.flow, reader.flow.stripped(detour[0]) if detour else dispatch)
    filled = [one for _, ones in _placed(reader, dispatch, block) for one in ones]
    check_apart(reader, filled, frozenset(block.tokens).difference(block.slots), block.expert)
    for one in filled:
        _check_binary(reader.flow, one, block, tested)
    routes: list[Route] = []
    binary = None if any(axis.at is not None for axis in dispatch.axes) else dispatch.node
    for term, ones in _placed(reader, block.combine, block, binary):
        for one in ones:
            if not any(implied(each, one) for each in filled):
                raise Unproven(one.slot.node, "what it brings back need not have been dispatched")
            if detour:
                check_detour(reader.flow, detour[1], one.term, block.combine)
        routes.append(_route(reader, term, ones, block, output))
    if not routes:
        raise Unproven(block.combine.node, "it is zero, whatever the tokens are")
    return tuple(routes)


def _placed(
    reader: Reader, view: View, block: Dispatch, binary: Node | None = None
) -> Iterator[tuple[Term, tuple[Placed, ...]]]:
    slots = block.within
    alone = (node for node in view.node.graph.nodes if gives_only_slot(node))
    giving = set[Node]() if slots else _depending(alone)

    def done(part: View) -> bool:
        return not part.axes & slots if slots else part.node not in giving

    for term in reader.terms(view, done, binary):
        if not reader.vanishes(term):
            yield term, placed(reader, term, slots, block.expert)


def _depending(nodes: Iterable[Node]) -> set[Node]:
    """Give everything that is computed from some nodes."""
    found, left = set[Node](), list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.users
    return found


def _tested(flow: Dataflow, view: View) -> tuple[View, bool]:
    """Go back from `x.bool()`, `x != 0` or, of what is never negative, `x > 0`."""
    tested = flow.tested(view)
    if tested is None and op_name(view.node) in ("gt", "greater") and not view.negated:
        tested = flow.operand(view.node.args[0], view) if number(view.node.args[1]) == 0 else None
        if tested is not None and not is_positive(flow, tested.node):
            raise Unproven(view.node, "a weight below zero would have no slot")
    return (view, False) if tested is None else (flow.stripped(tested), True)


def _check_binary(flow: Dataflow, one: Placed, block: Dispatch, tested: bool) -> None:
    """Raise `Unproven` unless a term, or whether it is zero, is zero or one."""
    for factor in () if tested else one.term.factors:
        if not flow.is_mask(factor):
            raise Unproven(factor.node, "tokens are scaled on their way to the experts")
    again = one.term.summed - one.rank.axes
    if again and not flow.differ(_ids(flow, one, block)[0], again):
        raise Unproven(one.slot.node, "a token may choose the same expert twice")


def _ids(flow: Dataflow, one: Placed, block: Dispatch) -> tuple[View, Fact]:
    """Give the ids that a term's tokens are sent to, and the fact that they are."""
    for fact, view in one.facts.items():
        if view is None or fact[0] not in ("one_hot", "several"):
            continue
        mask = flow.stripped(view)
        if fact[0] == "several" and (ids := flow.several(mask)) is not None:
            return ids, fact
        if fact[0] == "one_hot" and fact[2] == block.expert:
            return View(cast(Node, mask.node.args[0]), mask.dims[:-1]), fact
    raise Unproven(one.slot.node, "the chosen experts are not given as ids")


def _route(
    reader: Reader, term: Term, ones: tuple[Placed, ...], block: Dispatch, output: Node
) -> Route:
    one = ones[0]
    found = [(each.of_all(_ids(reader.flow, each, block)[0])) for each in ones]
    ids, chosen = _ids(reader.flow, one, block)
    if one.choice is not None:
        ids = found[0]
        chosen = ("one_hot", reader.flow.stripped(ids).key, leaves(block.expert))
    if any(each.key != ids.key for each in found):
        raise Unproven(one.slot.node, "its choices are not those of one tensor of ids")
    if any(axis.at is not None for axis in ids.axes):
        raise Unproven(ids.node, "only one of several choices is read")
    over = (axis for dim in ids.dims for axis in leaves(dim))
    choices = tuple(axis for axis in over if axis not in block.tokens)
    if not term.summed <= set(choices) or not size_along(choices).is_number:
        raise Unproven(one.slot.node, "it sums over more than a token's choices")
    before = frozenset(choices) - term.summed  # summed before: a gate for each expert
    if before and not reader.flow.differ(ids, before):
        raise Unproven(ids.node, "a token may choose the same expert twice")
    factors = [
        view
        for view in term.factors
        if (view != one.of_all(one.slot) or one.stop is not None) and reader.fact(view) != chosen
    ]
    seen = [_seen(reader.flow, view, block, choices, output) for view in (ids, *factors)]
    return Route(ids=seen[0], factors=tuple(seen[1:]), active=int(size_along(choices)))


def _plain(flow: Dataflow, view: View) -> View:
    """Go back from what only adds dimensions of one."""
    while (below := through_layout(view)) is not None:
        kept = [[dim for dim in map(leaves, one.dims) if dim] for one in (view, below)]
        if len(below.dims) >= len(view.dims) or kept[0] != kept[1]:
            break
        flow.read(below.node, view.node)
        view = below
    return view


def _choices_first(axes: Dim, tokens: Dim, choices: Dim, _: Dim) -> bool:
    """Tell whether a dimension runs over the tokens of each choice in turn."""
    first, rest = axes[: len(choices)], axes[len(choices) :]
    return bool(choices and rest) and first == choices and set(rest) <= set(tokens)


def _seen(flow: Dataflow, view: View, block: Dispatch, choices: Dim, output: Node) -> Seen:
    """Say how a node becomes [T, K, E], or what it has of it, by one sum, permute and reshape."""
    view = _plain(flow, view)
    flow.read(view.node, output)
    roles = (block.tokens, choices, block.expert)
    wanted = [axis for role in roles for axis in role]
    along = [leaves(dim) for dim in view.dims]
    split = next((place for place, axes in enumerate(along) if _choices_first(axes, *roles)), None)
    if split is not None:
        along[split : split + 1] = [choices, along[split][len(choices) :]]
    summed = [place for place, axes in enumerate(along) if axes and block.within.issuperset(axes)]
    stays = [place for place in range(len(along)) if place not in summed]
    if any(axis not in wanted for place in stays for axis in along[place]):
        raise Unproven(view.node, "it depends on more than tokens, choices and experts")
    order = sorted(stays, key=lambda place: wanted.index(along[place][0]) if along[place] else -1)
    found = [axis for place in order for axis in along[place]]
    has = [bool(role) and set(role) <= set(found) for role in roles]
    if found != [axis for role, there in zip(roles, has, strict=True) if there for axis in role]:
        raise Unproven(view.node, "its layout is not that of tokens, choices and experts")
    return Seen(
        node=view.node.name,
        negated=view.negated,
        split=split,
        summed=tuple(summed),
        order=tuple(stays.index(place) for place in order),
        tokens=has[0],
        choices=has[1],
        experts=has[2],
    )

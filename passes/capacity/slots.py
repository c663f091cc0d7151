"""Prove that no slot of an expert's buffer is ever given to two tokens.

Counts over zeros and ones differ wherever there is a one, so that tokens which are counted together
never meet. A second choice does not meet the first ones if it starts where they end:

    locations1 = cumsum(mask1) - 1
    locations2 = cumsum(mask2) - 1 + mask1.sum()      or only those of mask1 that were not dropped

Whatever the proof needs to hold has to be a factor of the dispatched term itself: a token for which
it does not hold has no slot, and what happens to its position does not matter.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, cast

from torch.fx import Node

from moecc.passes.axes import Axis, Dim, Extent, View, broadcast, leaves, shape_of, tensor_of
from moecc.passes.capacity.dataflow import ADDS, Unproven, number
from moecc.passes.capacity.ranks import Bend, Rank, Ranks
from moecc.passes.capacity.terms import Fact, Reader, Term
from moecc.passes.capacity.writes import stacked_along
from moecc.passes.pattern import op_name
from moecc.passes.sizes import same, sympy

_ZERO: Extent = sympy.Integer(0)

Facts = dict[Fact, View | None]
"""What holds for every token of a term, and the factor that says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One term of a dispatch or combine tensor: tokens that `facts` are true of lie at `rank`."""

    slot: View
    """The factor that says which slot: one at a token's position, else zero."""
    term: Term
    """All factors, taken apart."""
    facts: Facts
    rank: Rank
    start: Extent
    stop: Extent | None
    """The positions that have a slot; None: every one has, or the model refuses to run."""
    choice: tuple[Axis, Axis] | None = None
    """The axis of a token's choices, if they are proved one by one, and the one that this is."""

    def of_all(self, view: View) -> View:
        """See for all choices what is seen for this one."""
        return view.renamed((self.choice[1],), (self.choice[0],)) if self.choice else view


def placed(reader: Reader, term: Term, slots: frozenset[Axis], expert: Dim) -> tuple[Placed, ...]:
    """Read the positions of one term: of each choice alone, if those were stacked."""
    axis = _stacked(reader, term, slots)
    if axis is None:
        return (place(reader, term, slots, expert),)
    found: list[Placed] = []
    for index in range(int(axis.size)):
        one = reader.flow.pin(axis.size, index)
        factors = tuple(view.renamed((axis,), (one,)) for view in term.factors)
        alone = place(reader, Term(factors, term.summed - {axis}), slots, expert)
        found.append(replace(alone, choice=(axis, one)))
    return tuple(found)


def _stacked(reader: Reader, term: Term, slots: frozenset[Axis]) -> Axis | None:
    """Give the axis that a term sums over and along which its positions are stacked."""
    slot = _slot(reader, term, slots)
    position, _, _ = _position(reader, reader.flow.stripped(slot))
    position = reader.flow.stripped(position, whole=True)
    dim = stacked_along(position.node)
    axes = leaves(position.dims[dim]) if dim is not None else ()
    return axes[0] if len(axes) == 1 and axes[0] in term.summed else None


def place(reader: Reader, term: Term, slots: frozenset[Axis], expert: Dim) -> Placed:
    """Read the position of one term; raises `Unproven` if there is none to be read."""
    slot = _slot(reader, term, slots)
    view, start, stop = _position(reader, reader.flow.stripped(slot))
    rank = Ranks(reader, expert).read(view)
    whole = Term((), term.summed)
    for factor in term.factors:
        whole = reader.times(whole, reader.term(factor))
    whole = reader.settled(whole)
    facts: Facts = dict(reader.facts(whole))
    for fact in [*facts]:
        if fact[0] == "one_hot" and not whole.summed.isdisjoint(a for d in fact[1][2] for a in d):
            facts.setdefault(_one_of_several(fact, whole.summed))
    for index, bend in enumerate(rank.bends):
        if bend.unless is None or not _beyond(bend, rank, start, stop):
            continue
        if all(_leaves_alone(later, bend) for later in rank.bends[index + 1 :]):
            facts.setdefault(bend.unless)
    return Placed(slot=slot, term=whole, facts=facts, rank=rank, start=start, stop=stop)


def _slot(reader: Reader, term: Term, slots: frozenset[Axis]) -> View:
    """Give the factor that says which slot a token gets."""
    inside = [one for one in term.factors if _gives_slot(reader, one, slots)]
    if len(inside) != 1:
        raise Unproven(term.factors[0].node, "no single factor says which slot a token gets")
    return inside[0]


def _gives_slot(reader: Reader, factor: View, slots: frozenset[Axis]) -> bool:
    if slots:
        return bool(factor.axes & slots)
    return gives_only_slot(reader.flow.stripped(factor).node)


def gives_only_slot(node: Node) -> bool:
    """Recognise a mask over buffers of one slot, which have no axis for it."""
    sliced = _first_column(node) is not None
    masks = sliced or op_name(node) in ("one_hot", "eq")
    return masks and bool(shape_of(node)) and shape_of(node)[-1] == 1


def _position(reader: Reader, slot: View) -> tuple[View, Extent, Extent | None]:
    """Read a slot mask: `one_hot(p, C)`, some columns of it, or `p.unsqueeze(-1) == arange(C)`."""
    node, args = slot.node, cast(tuple[Any, ...], slot.node.args)
    if op_name(node) == "one_hot":
        reader.flow.read(args[0], node)
        return View(args[0], slot.dims[:-1]), _ZERO, None
    if op_name(node) == "getitem" and op_name(args[0]) == "one_hot":
        start = _first_column(node)
        if start is not None:
            reader.flow.read(args[0], node)
            reader.flow.read(args[0].args[0], args[0])
            return View(args[0].args[0], slot.dims[:-1]), start, start + shape_of(node)[-1]
    if op_name(node) == "eq" and len(args) == 2:
        for one, other in permutations(args):
            position, columns = (broadcast(arg, slot.dims) for arg in (one, other))
            if position and columns and _is_arange(reader.flow.stripped(columns), slot.dims[-1]):
                reader.flow.read(one, node)
                return position, _ZERO, shape_of(node)[-1]
    if node.op == "placeholder":
        raise Unproven(node, "it was made before this graph begins, which does not show how")
    raise Unproven(node, f"{op_name(node)} does not give each token one position in a buffer")


def _first_column(node: Node) -> Extent | None:
    """Give the start of `x[..., start:stop]`; None for any other index."""
    if op_name(node) != "getitem":
        return None
    source, index = cast(tuple[Any, ...], node.args)
    if not isinstance(index, tuple) or tensor_of(source) is None:
        return None
    *before, last = cast(tuple[Any, ...], index)
    whole = all(one is Ellipsis or one == slice(None) for one in before)
    reaches = Ellipsis in before or len(before) + 1 == len(shape_of(source))
    if not whole or not reaches or not isinstance(last, slice) or last.step not in (None, 1):
        return None
    start = number(last.start or 0)
    return start if start is not None and start.is_nonnegative else None


def _is_arange(view: View, along: Dim) -> bool:
    args = cast(tuple[Any, ...], view.node.args)
    counts = args[1:] if len(args) == 2 and args[0] == 0 else args
    plain = op_name(view.node) == "arange" and len(counts) == 1
    return plain and view.axes == frozenset(leaves(along))


def _beyond(bend: Bend, rank: Rank, start: Extent, stop: Extent | None) -> bool:
    """Tell whether the position that a bend gives has no slot in the end."""
    value = bend.high + rank.offset - bend.offset
    return stop is not None and (_at_least(value, stop) or _at_least(start, value + 1))


def _leaves_alone(later: Bend, bend: Bend) -> bool:
    """Tell whether a later step keeps the position that a bend gave, or demands something else."""
    value = bend.high + later.offset - bend.offset
    if later.unless is not None:
        return True
    below = later.high is None or _at_least(later.high, value)
    return below and (later.low is None or _at_least(value, later.low))


def _at_least(one: Extent, other: Extent) -> bool:
    return bool(sympy.expand(one - other).is_nonnegative)


def check_apart(
    reader: Reader, placed: Sequence[Placed], tokens: frozenset[Axis], expert: Dim
) -> None:
    """Raise `Unproven` unless no two tokens of these terms share a slot."""
    proof = _Proof(reader, tokens, expert)
    for one in placed:
        proof.check_alone(one)
    for index, one in enumerate(placed):
        for other in placed[index + 1 :]:
            if not proof.before(one, other) and not proof.before(other, one):
                why = "its positions do not start where those of another choice end"
                raise Unproven(other.rank.node, why)


class _Proof:
    def __init__(self, reader: Reader, tokens: frozenset[Axis], expert: Dim) -> None:
        self._reader = reader
        self._tokens = tokens
        self._ranks = Ranks(reader, expert)

    def check_alone(self, one: Placed) -> None:
        rank = one.rank
        if not rank.mask | rank.needs <= one.facts.keys():
            raise Unproven(rank.node, "a token that was not counted, or was dropped, gets a slot")
        moving = self._tokens | (one.term.summed & rank.axes)
        if not moving <= set(leaves(rank.along)):
            raise Unproven(rank.node, "it does not count all tokens and choices together")
        if any(base.axes & moving for base in rank.bases):
            raise Unproven(rank.node, "what is added to the count differs between tokens")
        for bend in rank.bends:
            if not self._is_harmless(bend, one):
                raise Unproven(bend.node, "it may give several tokens the same position")

    def _is_harmless(self, bend: Bend, one: Placed) -> bool:
        """Tell whether a bend keeps the position of every token that has a slot."""
        rank = one.rank
        if bend.unless is not None:
            return bend.unless in one.facts
        counted = all(self._counts(base, rank.along) is not None for base in rank.bases)
        if bend.low is not None and not (counted and _at_least(1 + bend.offset, bend.low)):
            return False
        if bend.high is None or _beyond(bend, rank, one.start, one.stop):
            return True
        limits = self._limits(one.facts, one, one.facts.keys())
        return any(_at_least(bend.high, limit - 1 + bend.offset) for limit in limits)

    def _limits(self, facts: Iterable[Fact], one: Placed, known: Set[Fact]) -> list[Extent]:
        """Say what some facts of a term show the bare count to be below, where `known` holds."""
        found: list[Extent] = []
        for fact in facts:
            view = one.facts[fact]
            if fact[0] != "below" or view is None:
                continue
            compared = self._reader.compared(self._reader.flow.stripped(view))
            try:
                other = self._ranks.read(compared[0]) if compared else None
            except Unproven:
                continue
            if compared is None or other is None or other.bends or not other.needs <= known:
                continue
            if other.counts_like(one.rank) and _at_least(1 + other.offset, _ZERO):
                found.append(compared[1] - other.offset)
        return found

    def _counts(self, base: View, along: Dim) -> list[frozenset[Fact]] | None:
        """Read a base as a sum of how many ones masks have; None if it is anything else."""
        if op_name(base.node) in ADDS:
            if base.node.kwargs:
                return None
            summands = [arg for arg in base.node.args if number(arg) != 0]
            operands = [self._reader.flow.operand(arg, base) for arg in summands]
            bases = [one and self._reader.flow.stripped(one) for one in operands]
            parts = [one and self._counts(one, along) for one in bases]
            return None if None in parts else [one for part in parts for one in part or ()]
        term = self._reader.term(base, along=along, whole=True)
        masks = all(map(self._reader.flow.is_mask, term.factors))
        counted = masks and term.summed == frozenset(leaves(along))
        return [frozenset(self._reader.facts(term))] if counted else None

    def before(self, one: Placed, other: Placed) -> bool:
        """Tell whether all positions of `one` lie below those of `other`."""
        mine, theirs = one.rank, other.rank
        if leaves(mine.along) != leaves(theirs.along) or not _at_least(theirs.offset, mine.offset):
            return False
        taken, start = (self._total(rank) for rank in (mine, theirs))
        if taken is None or start is None:
            return False
        for count in taken:
            if count not in start:
                return False
            start.remove(count)
        return any(self._covers(count, one) for count in start)

    def _total(self, rank: Rank) -> list[frozenset[Fact]] | None:
        parts = [self._counts(base, rank.along) for base in rank.bases]
        return None if None in parts else [count for part in parts for count in part or ()]

    def _covers(self, count: frozenset[Fact], one: Placed) -> bool:
        """Tell whether a count is at least the highest count of a term's tokens.

        It is if it counts the whole mask, or all of it that came before some position.
        """
        mask = one.rank.mask
        if not mask <= count or not count <= one.facts.keys():
            return count == mask
        return all(self._limits([fact], one, mask) for fact in count - mask)


def implied(other: Placed, one: Placed) -> bool:
    """Tell whether all facts of `other` hold for a term's tokens, whatever its sums run over."""
    facts = frozenset(other.facts)
    if facts <= one.facts.keys():
        return True
    pairs = [(a, b) for a in other.term.summed for b in one.term.summed if same(a.size, b.size)]
    return any(_renamed(facts, old, new) <= one.facts.keys() for old, new in pairs)


def _one_of_several(fact: Fact, choices: frozenset[Axis]) -> Fact:
    """Say of one_hot(ids)[t, k, e] that it makes the sum over k so."""
    _, (node, _, dims), expert = fact
    kept = tuple(tuple(axis for axis in dim if axis not in choices) for dim in dims)
    return ("several", (node, kept), frozenset(expert))


def _renamed(facts: frozenset[Fact], old: Axis, new: Axis) -> frozenset[Fact]:
    def renamed(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(map(renamed, cast(tuple[Any, ...], part)))
        return new if part is old else part

    return frozenset(map(renamed, facts))

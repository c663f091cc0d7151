"""Read a token's position in its expert's buffer as a count of the tokens before it.

    cumsum(mask, 0) - 1      cumsum(mask, 0) - mask      (... * mask).sum(-1)      gather(..., ids)

A rank is a count, a constant and what earlier choices took. Where a mask or a clamp may make it
something else, that is noted, for the proof to decide whether it matters.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

from torch.fx import Node

from moecc.passes.axes import Axis, Dim, Extent, View, leaves, shape_of
from moecc.passes.capacity.counts import counted
from moecc.passes.capacity.dataflow import ADDS, SUBTRACTS, Unproven, number
from moecc.passes.capacity.terms import Fact, Reader, Term
from moecc.passes.pattern import op_name
from moecc.passes.sizes import same, sympy

_ZERO: Extent = sympy.Integer(0)

_CLAMPS = {"clamp", "clip", "clamp_min", "clamp_max"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bend:
    """A step that keeps a position only in some range, or only where something holds."""

    node: Node
    offset: Extent
    """What had been added to the count by then."""
    low: Extent | None = None
    high: Extent | None = None
    """Positions beyond are brought back to these."""
    unless: Fact | None = None
    """Positions become `high` where this does not hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A position: where `mask` is one, how many ones there are up to here, `offset` and `bases`."""

    node: Node
    mask: frozenset[Fact]
    along: Dim
    """What the count runs along."""
    axes: frozenset[Axis]
    """What the count depends on."""
    offset: Extent = _ZERO
    bases: tuple[View, ...] = ()
    needs: frozenset[Fact] = frozenset()
    """What has to hold beside the mask for the position to be this."""
    bends: tuple[Bend, ...] = ()

    def counts_like(self, other: "Rank") -> bool:
        """Tell whether two ranks differ by nothing but a constant."""
        mine, others = ([base.key for base in one.bases] for one in (self, other))
        return (self.mask, leaves(self.along), mine) == (other.mask, leaves(other.along), others)


class Ranks:
    """Reads the positions of a graph."""

    def __init__(self, reader: Reader, expert: Dim) -> None:
        self._reader = reader
        self._expert = expert

    def read(self, view: View) -> Rank:
        """Read a position, or the one that is left of those with each expert.

        Raises `Unproven` naming the node that is no count.
        """
        reader, flow = self._reader, self._reader.flow
        factors = self._at_expert(view, reader.settled(reader.term(view, whole=True)))
        masks = [one for one in factors if flow.is_mask(one)]
        counts = [one for one in factors if not flow.is_mask(one)]
        if len(counts) != 1:
            raise Unproven(view.node, "it is not the position of a token with one expert")
        rank = self._count(counts[0])
        return replace(rank, node=view.node, needs=rank.needs.union(map(reader.fact, masks)))

    def _at_expert(self, view: View, term: Term) -> tuple[View, ...]:
        """Read a sum over experts that one_hot(ids) is a factor of at the chosen expert."""
        if not term.summed:
            return term.factors
        summed = tuple(term.summed)
        facts = self._reader.facts(term)
        masked = any(fact[0] == "one_hot" and fact[2] == summed for fact in facts)
        if not masked or len(summed) != len(self._expert):
            raise Unproven(view.node, "it adds positions up over more than the experts")
        return tuple(one.renamed(summed, self._expert) for one in term.factors)

    def _count(self, view: View) -> Rank:
        node, name = view.node, op_name(view.node)
        if name in ADDS | SUBTRACTS and len(node.args) == 2 and not node.kwargs:
            return self._shifted(view)
        if (count := counted(self._reader.flow, view)) is not None:
            return self._counted(view, *count)
        if name in _CLAMPS:
            return self._clamped(view)
        if name in ("where", "masked_fill") and len(node.args) == 3:
            return self._filled(view)
        if name == "gather" and len(node.args) == 3 and not node.kwargs:
            return self._gathered(view)
        raise Unproven(node, f"{name} is not a count of the tokens before one")

    def _seen(self, operand: Any, view: View, negated: bool = False) -> View:
        seen = self._reader.flow.operand(operand, view, negated)
        if seen is None:
            raise Unproven(view.node, f"{op_name(view.node)} has an operand that is no tensor")
        return seen

    def _shifted(self, view: View) -> Rank:
        left, right = view.node.args[:2]
        minus = op_name(view.node) in SUBTRACTS
        if (shift := number(right)) is not None:
            rank = self.read(self._seen(left, view))
            return replace(rank, offset=rank.offset + (-shift if minus else shift))
        if (shift := number(left)) is not None and not minus:
            rank = self.read(self._seen(right, view))
            return replace(rank, offset=rank.offset + shift)
        one, other = self._seen(left, view), self._seen(right, view)
        if not minus:
            return self._based(one, other)
        rank, term = self.read(one), self._reader.term(other)
        if term.summed or frozenset(self._reader.facts(term)) != rank.mask:
            raise Unproven(view.node, "what it subtracts is not the mask that was counted")
        return replace(rank, offset=rank.offset - 1)

    def _based(self, one: View, other: View) -> Rank:
        try:
            rank, base = self.read(one), other
        except Unproven:
            rank, base = self.read(other), one
        if rank.bends:
            raise Unproven(base.node, "it is added to positions that were clamped before")
        base = self._reader.flow.stripped(base)
        return replace(rank, bases=(*rank.bases, base), axes=rank.axes | base.axes)

    def _counted(self, view: View, source: View, dim: int, offset: int) -> Rank:
        term = self._reader.term(source)
        if term.summed or not all(map(self._reader.flow.is_mask, term.factors)):
            raise Unproven(source.node, "what is counted is not a mask of zeros and ones")
        if any(axis.at is not None for axis in leaves(view.dims[dim])):
            raise Unproven(view.node, "it counts over choices, of which each is looked at alone")
        return Rank(
            node=view.node,
            mask=frozenset(self._reader.facts(term)),
            along=view.dims[dim],
            axes=view.axes,
            offset=sympy.Integer(offset),
        )

    def _clamped(self, view: View) -> Rank:
        node, name = view.node, op_name(view.node)
        first, second = (*node.args[1:], None, None)[:2]
        low = node.kwargs.get("min", None if name == "clamp_max" else first)
        high = node.kwargs.get("max", first if name == "clamp_max" else second)
        limits = (number(low), number(high))
        if (low is not None and limits[0] is None) or (high is not None and limits[1] is None):
            raise Unproven(node, "it clamps positions to something that is no number")
        rank = self.read(self._seen(node.args[0], view))
        bend = Bend(node=node, offset=rank.offset, low=limits[0], high=limits[1])
        return replace(rank, bends=(*rank.bends, bend))

    def _filled(self, view: View) -> Rank:
        node = view.node
        kept, condition, fill = cast(tuple[Any, ...], node.args)
        negated = True
        if op_name(node) == "where":
            condition, kept, fill = kept, condition, fill
            negated = number(kept) is not None
            kept, fill = (fill, kept) if negated else (kept, fill)
        value = number(fill)
        if value is None:
            raise Unproven(node, "it replaces positions with something that is no number")
        rank = self.read(self._seen(kept, view))
        fact = self._reader.fact(self._seen(condition, view, negated))
        bend = Bend(node=node, offset=rank.offset, high=value, unless=fact)
        return replace(rank, bends=(*rank.bends, bend))

    def _gathered(self, view: View) -> Rank:
        """Read `gather(positions, -1, ids)`: the position with the chosen expert."""
        node, reader = view.node, self._reader
        source, dim, index = cast(tuple[Node, Any, Node], node.args)
        sizes, chosen = shape_of(source), shape_of(index)
        aligned = all(same(one, other) for one, other in zip(sizes[:-1], chosen[:-1], strict=True))
        if dim not in (-1, len(sizes) - 1) or not aligned:
            raise Unproven(node, "it does not gather along the experts")
        reader.flow.read(source, node)
        reader.flow.read(index, node)
        rank = self.read(View(source, (*view.dims[:-1], self._expert)))
        ids = reader.flow.stripped(View(index, view.dims))
        need = ("one_hot", ids.key, leaves(self._expert))
        return replace(rank, needs=rank.needs | {need})

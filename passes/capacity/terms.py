"""Read a node as a sum of products of nodes over named axes, however the model spells it.

    einsum("se,sc->sec", g, l)     g.unsqueeze(2) * l.unsqueeze(1)     torch.where(m, g, 0) ...

A `Term` is one product; what cannot be taken apart is a factor of its own. A `Fact` says that a
factor is not zero: all facts of a term hold wherever the term is not zero.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from torch.fx import Node

from moecc.passes.axes import Axis, Dim, Extent, View, leaves, through_layout
from moecc.passes.capacity.dataflow import ADDS, ZEROS, Dataflow, Unproven, is_whole, number
from moecc.passes.pattern import op_name

_COMPARISONS = {
    "lt": (True, 0), "less": (True, 0), "le": (True, 1), "less_equal": (True, 1),
    "ge": (False, 0), "greater_equal": (False, 0), "gt": (False, 1), "greater": (False, 1),
}  # fmt: skip
"""Each comparison as `x < bound`, of whole numbers as `x < bound + 1`, or as the contrary."""

Fact = tuple[Any, ...]
"""In a form in which equal facts are equal."""


@dataclass(frozen=True, slots=True)
class Term:
    """A product of factors, summed over axes that only its factors have."""

    factors: tuple[View, ...]
    summed: frozenset[Axis] = frozenset()


class Reader:
    """Reads the products of a graph."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow

    def term(self, view: View, along: Dim = (), whole: bool = False) -> Term:
        """Read a product. `along` is as in `Dataflow.summand`, `whole` as in `stripped`."""
        view = self.flow.stripped(view, whole)
        if (parts := self.flow.factors(view)) is not None:
            factors, summed = parts
            term = Term((), summed)
            for factor in factors:
                term = self.times(term, self.term(factor, along, whole))
            return term
        inside = None if self.flow.several(view) else self.flow.summand(view, along)
        if inside is not None:
            return self.times(Term((), inside[1]), self.term(inside[0], along, whole))
        if (tested := self.flow.tested(view)) is not None and self.flow.is_mask(tested):
            return self.term(tested, along, whole)
        return Term((view,))

    def terms(
        self, view: View, done: Callable[[View], bool], binary: Node | None = None
    ) -> tuple[Term, ...]:
        """Read a sum of products, leaving whole what is `done`.

        A test whether masks are zero is read as the masks: one product of them, or the sum `binary`
        of several, which is known to be zero or one.
        """
        if done(view) or view.negated:
            return (Term((view,)),)
        if (below := through_layout(view)) is not None:
            self.flow.read(below.node, view.node)
            return self.terms(below, done, binary)
        if op_name(view.node) in ADDS and len(view.node.args) == 2 and not view.node.kwargs:
            operands = [self.flow.operand(arg, view) for arg in view.node.args]
            if None not in operands:
                parts = (self.terms(cast(View, one), done, binary) for one in operands)
                return tuple(itertools.chain.from_iterable(parts))
        if (inside := self.flow.summand(view)) is not None:
            inner = self.terms(inside[0], done, binary)
            return tuple(self.times(Term((), inside[1]), term) for term in inner)
        if (tested := self.flow.tested(view)) is not None:
            inner = self.terms(tested, done, binary)
            masks = all(self.flow.is_mask(one) for term in inner for one in term.factors)
            single = len(inner) == 1 and not inner[0].summed
            known = single or self.flow.stripped(tested).node is binary
            return inner if masks and known else (Term((view,)),)
        if (parts := self.flow.factors(view)) is None:
            return (Term((view,)),)
        total: tuple[Term, ...] = (Term((), parts[1]),)
        for factor in parts[0]:
            more = self.terms(factor, done, binary)
            total = tuple(self.times(one, other) for one in total for other in more)
        return total

    def times(self, one: Term, other: Term) -> Term:
        """Multiply; a sum that both have runs over an axis of its own in each."""
        for axis in one.summed & other.summed:
            copy = axis
            while copy in one.summed | other.summed:
                copy = self.flow.bound.setdefault((copy, "again"), Axis(axis.size))
            factors = tuple(view.renamed((axis,), (copy,)) for view in other.factors)
            other = Term(factors, other.summed - {axis} | {copy})
        return Term((*one.factors, *other.factors), one.summed | other.summed)

    def vanishes(self, term: Term) -> bool:
        """Tell whether a factor is made of zeros, as the mask of a choice that is switched off."""
        try:
            inner = [one for factor in term.factors for one in self.term(factor).factors]
        except Unproven:
            return False
        return any(op_name(one.node) in ZEROS and not one.negated for one in inner)

    def settled(self, term: Term) -> Term:
        """Drop sums over e' of what holds one_hot(ids)[e'], beside one_hot(ids)[e]."""
        known = [fact for fact in map(self.fact, term.factors) if fact[0] == "one_hot"]
        for (_, ids, inner), (_, other, outer) in itertools.permutations(known, 2):
            alike = ids == other and inner != outer and len(inner) == len(outer)
            if alike and term.summed.issuperset(inner):
                factors = tuple(view.renamed(inner, outer) for view in term.factors)
                return self.settled(Term(factors, term.summed.difference(inner)))
        return term

    def facts(self, term: Term) -> dict[Fact, View]:
        """Say what holds wherever a product is not zero."""
        return {self.fact(view): view for view in self.settled(term).factors}

    def fact(self, view: View) -> Fact:
        """Say that a factor is not zero."""
        view = self.flow.stripped(view)
        node, args = view.node, cast(tuple[Any, ...], view.node.args)
        fact: Fact = replace(view, negated=False).key
        if op_name(node) == "one_hot":
            self.flow.read(args[0], node)
            ids = self.flow.stripped(View(args[0], view.dims[:-1]))
            fact = ("one_hot", ids.key, leaves(view.dims[-1]))
        elif (ids := self.flow.several(view)) is not None:
            fact = (
                "several",
                several_key(self.flow.stripped(ids), view.axes),
                view.axes - ids.axes,
            )
        elif (compared := self.compared(view)) is not None:
            fact = ("below", compared[0].key, compared[1])
            fact = fact if _COMPARISONS[op_name(node)][0] else ("not", fact)
        if not view.negated:
            return fact
        return fact[1] if fact[0] == "not" else ("not", fact)

    def compared(self, view: View) -> tuple[View, Extent] | None:
        """Read a comparison as `x < bound` or its contrary: give x and the bound."""
        if op_name(view.node) not in _COMPARISONS:
            return None
        left, right = cast(tuple[Any, ...], view.node.args)[:2]
        seen, bound = self.flow.operand(left, view), number(right)
        extra = _COMPARISONS[op_name(view.node)][1]
        if bound is None or seen is None or (extra and not is_whole(left)):
            return None
        return self.flow.stripped(seen), bound + extra


def several_key(ids: View, kept: frozenset[Axis]) -> tuple[Any, ...]:
    """Identify ids by all their axes but the choices of a token."""
    dims = tuple(tuple(axis for axis in leaves(dim) if axis in kept) for dim in ids.dims)
    return (ids.node, dims)

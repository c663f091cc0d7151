"""Read a value as a product of factors, summed over axes, however the model spells it.

    einsum("tai,ta->ti", y, w)     (y * w.unsqueeze(-1)).sum(1)     (w.unsqueeze(1) @ y).squeeze(1)

are all the product of y[t, a, i] and w[t, a] summed over a, and `w1[ids]` as well as a grouped
product over sorted rows hold, for each index of ids, the matrix that ids choose. Reading goes from
the value back to its factors (`passes/axes.py` says with which axes each is indexed), only as far
as somebody asks: `cuts` gives every way of seeing a value as so many factors.
"""

import itertools
from collections.abc import Iterator, Set
from typing import Any, cast

from torch.fx import Node

from moecc.passes.axes import (
    Axis,
    Dims,
    View,
    broadcast,
    contracted,
    leaves,
    over_own_axes,
    shape_of,
    tensor_of,
)
from moecc.passes.pattern import mutates, op_name
from moecc.passes.products.factor import Chain, Factor
from moecc.passes.products.rearranged import one_step_back
from moecc.passes.products.selected import Axes
from moecc.passes.products.sorting import groups_of, sorted_ids, unsorted
from moecc.passes.sizes import same

GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
PRODUCTS = {"einsum", "matmul", "bmm", "mm", "linear", *GROUPED}
"""What multiplies matrices."""
MULTIPLY = ("mul", "multiply", "imul", "mul_")
_ADD = ("add", "iadd", "add_")


class Reading:
    """Reads products over one set of axes."""

    def __init__(self) -> None:
        self._axes = Axes()

    def start(self, node: Node, dims: Dims | None = None) -> Factor:
        """See a node over given axes, or over its own."""
        return Factor(view=over_own_axes(node) if dims is None else View(node, dims))

    def chain(self, factor: Factor) -> Chain:
        """Go back while values are only rearranged."""
        chain = [factor]
        while (before := one_step_back(chain[-1], self._axes)) is not None:
            chain.append(before)
        return tuple(chain)

    def cuts(self, value: Factor, count: int) -> Iterator[tuple[Chain, ...]]:
        """Give every way of reading a value as a product of `count` factors."""
        chain = self.chain(value)
        if count == 1:
            yield (chain,)
            return
        parts = self._operands(chain[-1])
        for counts in _compositions(count, len(parts)):
            ways = [tuple(self.cuts(part, one)) for part, one in zip(parts, counts, strict=True)]
            for found in itertools.product(*ways):
                yield tuple(itertools.chain.from_iterable(found))

    def unsorted(self, factor: Factor) -> set[Axis]:
        """Give the axes of a value, for those of sorted rows what they were before."""
        sortings = {axis: self._axes.sorting((axis,)) for axis in factor.axes}
        found = (one.unsorted if one else (axis,) for axis, one in sortings.items())
        return {*leaves(itertools.chain.from_iterable(found))}

    def lost(self, nodes: Set[Node], known: Set[Axis]) -> Node | None:
        """Give a node that sums over an axis which no factor has: it multiplies by its size."""
        for (node, *place), axis in self._axes.bound.items():
            unknown = not known >= {*leaves((axis,))}
            if node in nodes and place[0] not in ("sorted", "experts") and unknown:
                return node
        return None

    def biased(self, factor: Factor) -> tuple[Factor, Factor] | None:
        """Read a product plus something that is none: the product first."""
        node = factor.node
        if op_name(node) not in _ADD or not _is_plain(node):
            return None
        parts = _elementwise(factor)
        products = [bool(self._operands(self.chain(part)[-1])) for part in parts]
        if sum(products) != 1:
            return None
        return (parts[0], parts[1]) if products[0] else (parts[1], parts[0])

    def _operands(self, factor: Factor) -> tuple[Factor, ...]:
        """Take one product apart; nothing if it is none."""
        node, name = factor.node, op_name(factor.node)
        if factor.ids is not None:
            return ()
        if name in MULTIPLY and _is_plain(node):
            return _elementwise(factor)
        if name in GROUPED:
            return self._grouped(factor)
        if name == "linear":
            views = self._linear(factor)
        else:
            views = contracted(factor.view, self._axes.bound)
        return tuple(factor.back(view.node, view.dims) for view in views or ())

    def _linear(self, factor: Factor) -> tuple[View, ...]:
        rows, matrix, *rest = cast(tuple[Any, ...], (*factor.node.args, None, None))
        if any(rest) or tensor_of(matrix) is None or factor.node.kwargs.get("bias") is not None:
            return ()
        *outer, column = factor.view.dims
        size = shape_of(rows)[-1]
        inner = (self._axes.bound.setdefault((factor.node, "inner"), Axis(size)),)
        return View(rows, (*outer, inner)), View(matrix, (column, inner))

    def _grouped(self, factor: Factor) -> tuple[Factor, ...]:
        """Read a product of sorted rows with their experts' matrices."""
        node = factor.node
        if len(node.args) < 2:
            return ()
        rows, matrices, offsets = cast(tuple[Any, ...], (*node.args, node.kwargs.get("offs")))[:3]
        extra = {key for key, value in node.kwargs.items() if value is not None} - {"offs"}
        sorting, groups = self._axes.sorting(factor.view.dims[0]), groups_of(offsets)
        if sorting is None or groups is None or extra or len(shape_of(matrices)) != 3:
            return ()
        flat = cast(Node, sorted_ids(sorting.order))
        experts, width, _ = shape_of(matrices)
        if unsorted(flat) is not groups.ids or not same(experts, groups.experts):
            return ()
        bound = self._axes.bound
        expert = (bound.setdefault((node, "experts"), Axis(experts)),)
        inner = (bound.setdefault((node, "inner"), Axis(width)),)
        outer, column = factor.view.dims
        ids, aids = View(flat, (sorting.unsorted,)), (*groups.nodes, sorting.order)
        return (
            factor.back(rows, (outer, inner), aids),
            factor.back(matrices, (expert, inner, column), aids, ids=ids, grouped=True),
        )


def _elementwise(factor: Factor) -> tuple[Factor, ...]:
    """Give both operands of something elementwise; nothing if one is no tensor."""
    seen = [broadcast(arg, factor.view.dims) for arg in factor.node.args]
    views = [view for view in seen if view is not None]
    if len(views) != 2:
        return ()
    return tuple(factor.back(view.node, view.dims) for view in views)


def _is_plain(node: Node) -> bool:
    """Tell whether a call of two operands is no more than that, and nobody sees it if in place."""
    first = node.args[0] if node.args else None
    unseen = not mutates(node) or (isinstance(first, Node) and len(first.users) == 1)
    return len(node.args) == 2 and not node.kwargs and unseen


def _compositions(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """Give every way of writing a number as a sum of so many positive ones, in order."""
    if count == 1:
        yield (total,)
    for first in range(1, total - count + 2) if count > 1 else ():
        for rest in _compositions(total - first, count - 1):
            yield (first, *rest)

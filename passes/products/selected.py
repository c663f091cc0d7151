"""Go one step back from rows that were picked by an index or added up where one says.

Rows that are sorted by expert are remembered: their axis stands for the axes that they had before,
and whatever brings the rows back leads to them again.
"""

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch.fx import Node

from moecc.passes.axes import (
    Axis,
    Bound,
    Dim,
    View,
    deal,
    leaves,
    over_own_axes,
    shape_of,
    size_along,
    tensor_of,
    through_layout,
)
from moecc.passes.pattern import mutates, op_name
from moecc.passes.products.factor import Factor
from moecc.passes.products.sorting import inverse_of, sorted_ids, token_of
from moecc.passes.router.values import argument
from moecc.passes.sizes import expression, same, same_shape

_ZEROS = ("zeros", "zeros_like", "new_zeros")
FRESH = ("empty", "empty_like", "new_empty", *_ZEROS)
"""What makes a tensor that nobody else has."""
_WHOLE = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class Sorting:
    """What an axis of sorted rows was before."""

    order: Node
    unsorted: Dim


@dataclass(slots=True)
class Axes:
    """What is known about the axes of one reading."""

    bound: Bound = field(default_factory=Bound)
    """Axes of sums, by the node that sums."""
    sorted: dict[Axis, Sorting] = field(default_factory=dict[Axis, Sorting])

    def sorting(self, dim: Dim) -> Sorting | None:
        """Give what is known of a dimension that is one axis of sorted rows."""
        axes = leaves(dim)
        return self.sorted.get(axes[0]) if len(axes) == 1 else None

    def sort(self, dim: Dim, size: Any, order: Node, at: Node) -> Dim | None:
        """Make the axis of the rows of `dim` in sorted order, if there are so many."""
        if not same(size_along(dim), size):
            return None
        axis = self.bound.setdefault((at, "sorted", leaves(dim)), Axis(size))
        self.sorted[axis] = Sorting(order, leaves(dim))
        return (axis,)


def getitem(factor: Factor, axes: Axes) -> Factor | None:
    """Read `x[index]` and `x[index, :]`."""
    source, index = cast(tuple[Any, ...], factor.node.args)
    if isinstance(index, tuple) and index:
        first, *rest = cast(tuple[Any, ...], index)
        index = first if all(one is Ellipsis or one == slice(None) for one in rest) else None
    return _selected(factor, axes, source, index)


def index_select(factor: Factor, axes: Axes) -> Factor | None:
    """Read `x.index_select(0, index)`."""
    node, source = factor.node, cast(Node, factor.node.args[0])
    rows = argument(node, 1, "dim") == 0
    return _selected(factor, axes, source, argument(node, 2, "index")) if rows else None


def gather(factor: Factor, axes: Axes) -> Factor | None:
    """Read `gather(x, 0, tokens.reshape(-1, 1).expand(-1, H))`, which selects whole rows."""
    node, source = factor.node, cast(Node, factor.node.args[0])
    whole = same_shape(shape_of(source)[1:], shape_of(node)[1:])
    if argument(node, 1, "dim") != 0 or not whole:
        return None
    return _selected(factor, axes, source, _rows_index(argument(node, 2, "index")))


def _rows_index(index: Any) -> Node | None:
    """Give the 1-D index that an index of whole rows repeats."""
    if tensor_of(index) is None:
        return None
    view: View | None = over_own_axes(index)
    rows = leaves(view.dims[0])
    while view is not None:
        if len(view.dims) == 1:
            return view.node if leaves(view.dims[0]) == rows else None
        view = through_layout(view)
    return None


def _selected(factor: Factor, axes: Axes, source: Node, index: Any) -> Factor | None:
    """Read rows picked by an index: sorted, a token's own, brought back, or an expert's matrix."""
    value = tensor_of(index)
    if value is None or value.dtype not in _WHOLE:
        return None
    rank = len(shape_of(index))
    first, rest = factor.view.dims[:rank], factor.view.dims[rank:]
    if rank == 1 and (sorting := axes.sorting(first[0])):
        if index is sorting.order:
            return factor.back(source, (sorting.unsorted, *rest), (index,))
        read = token_of(index)
        if read is None or read[0] is not sorting.order:
            return None
        order, active, aids = read
        parts = deal(sorting.unsorted, (shape_of(source)[0], expression(_scalar(active))))
        return None if parts is None else factor.back(source, (parts[0], *rest), (order, *aids))
    if rank == 1 and (read := inverse_of(index)):
        order, _, aids = read
        rows = axes.sort(first[0], shape_of(source)[0], order, factor.node)
        return factor.back(source, (rows, *rest), (order, index, *aids)) if rows else None
    if len(rest) == 0:
        return None
    experts = axes.bound.setdefault((factor.node, "experts"), Axis(shape_of(source)[0]))
    return factor.back(source, ((experts,), *rest), (index,), ids=View(index, first))


def _scalar(value: Any) -> Any:
    return value.meta["example_value"] if isinstance(value, Node) else value


def scattered(factor: Factor, axes: Axes) -> Factor | None:
    """Read sorted rows that are added to their tokens: a sum over a token's choices."""
    node = factor.node
    base, index = cast(Node, node.args[0]), argument(node, 2, "index")
    rows = argument(node, 3, "src", node.kwargs.get("source"))
    if argument(node, 1, "dim") != 0 or tensor_of(rows) is None or factor.path:
        return None
    if argument(node, 4, "alpha", 1) != 1 or "out" in node.kwargs:
        return None
    if tensor_of(index) is None or not same_shape(shape_of(rows)[1:], shape_of(node)[1:]):
        return None
    if op_name(node).startswith("scatter"):
        index = _rows_index(index) if same_shape(shape_of(index), shape_of(rows)) else None
    read = token_of(index)
    if read is None:
        return None
    order, active, aids = read
    choices = axes.bound.setdefault((node, "choices"), Axis(expression(_scalar(active))))
    first, *rest = factor.view.dims
    dim = axes.sort((*first, choices), shape_of(rows)[0], order, node)
    if dim is None:
        return None
    new = op_name(base) in _ZEROS
    if mutates(node) and not (new and _only_read_after(base, node)):
        return None
    aids = (order, *aids, base) if new else (order, *aids)
    return factor.back(rows, (dim, *rest), aids, onto=None if new else base)


def unpermuted(factor: Factor, axes: Axes) -> Factor | None:
    """Read `out = empty_like(y); out[order] = y`, which brings sorted rows back."""
    base = factor.node
    writes = [user for user in base.users if mutates(user)]
    if len(writes) != 1 or not _only_read_after(base, writes[0]):
        return None
    (write,) = writes
    place = {"setitem": (1, 2), "index_copy_": (2, 3)}.get(op_name(write))
    if place is None or write.args[0] is not base or len(write.args) != place[1] + 1:
        return None
    order, rows = (cast(Node, write.args[one]) for one in place)
    if place[0] == 2 and write.args[1] != 0:
        return None
    if sorted_ids(order) is None or not same_shape(shape_of(rows), shape_of(base)):
        return None
    first, *rest = factor.view.dims
    dim = axes.sort(first, shape_of(rows)[0], order, base)
    if dim is None:
        return None
    found = factor.back(rows, (dim, *rest), (order,))
    return replace(found, path=(*found.path, write))


def _only_read_after(base: Node, write: Node) -> bool:
    """Tell whether nobody sees what a tensor held before it was written to."""
    return all(user is write or write < user for user in base.users)

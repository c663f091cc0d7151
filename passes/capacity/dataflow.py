"""Read where a graph's values come from, one step at a time, over named axes.

Dynamo graphs write in place. A value is only read where no write to its memory lies between where
it was made and where it is used, or where all of those are seen (`writes`); everything else is
`Unproven`.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.multiprocessing.reductions import StorageWeakRef

from moecc.passes.axes import (
    Axis,
    Bound,
    Dim,
    Extent,
    View,
    broadcast,
    contracted,
    leaves,
    shape_of,
    size_along,
    tensor_of,
    through_layout,
)
from moecc.passes.capacity.writes import (
    pinned,
    row_read,
    row_written,
    stacked_along,
    value_written,
)
from moecc.passes.pattern import mutates, op_name
from moecc.passes.sizes import expression, same, sympy

ADDS = frozenset({"add", "iadd", "add_"})
SUBTRACTS = frozenset({"sub", "isub", "sub_", "subtract"})
_MULTIPLIES = {"mul", "imul", "mul_", "multiply"}
_CONJUNCTIONS = {"and_", "__and__", "bitwise_and", "logical_and", "iand"}
_NEGATIONS = {"logical_not", "bitwise_not", "invert", "__invert__"}
_SCATTERS = {"scatter", "scatter_"}
ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
_TO_WHOLE = {"long", "int", "to", "type"}
_HOLD_COUNTS = (torch.bool, torch.int32, torch.int64, torch.float32, torch.float64)


class Unproven(Exception):
    """The graph does not show what it would have to."""

    def __init__(self, node: Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


class Dataflow:
    """Reads one graph."""

    def __init__(self, graph: Graph) -> None:
        self.bound: Bound = {}
        self._place = {node: place for place, node in enumerate(graph.nodes)}
        self._writes: dict[StorageWeakRef, list[Node]] = {}
        for node in filter(mutates, graph.nodes):
            for written in _written(node):
                self._writes.setdefault(written, []).append(node)

    def read(self, node: Node, user: Node) -> None:
        """Raise `Unproven` if `user` finds another value in `node` than was put there."""
        if self._between(node, user):
            raise Unproven(node, f"it is written to in place before {user.name} reads it")

    def found(self, view: View, user: Node) -> View:
        """Give what `user` finds: what a view was made as, or what was last written to it.

        Raises `Unproven` if it cannot be told what was.
        """
        writes = self._between(view.node, user)
        index = pinned(view.dims[0]) if writes and view.dims else None
        rows = [row_written(write, view.node) for write in writes]
        if index is None or None in rows:
            self.read(view.node, user)
            return view
        last = [write for write, row in zip(writes, rows, strict=True) if row == index][-1:]
        if not last:
            return view
        node, inside = value_written(last[0]), view.dims[1:]
        return self.found(replace(view, node=node, dims=inside), last[0])

    def _between(self, node: Node, user: Node) -> list[Node]:
        """Give what writes to a node's memory between where it is made and where it is used."""
        value = tensor_of(node)
        writes = self._writes.get(_storage(value), []) if value is not None else []
        start, stop = self._place[node], self._place[user]
        return [write for write in writes if start < self._place[write] < stop]

    def pin(self, size: Extent, index: int) -> Axis:
        """Give the axis that stands for one index of a dimension."""
        return self.bound.setdefault(("at", size, index), Axis(size, at=index))

    def operand(self, value: Any, view: View, negated: bool = False) -> View | None:
        """See an operand of something elementwise, if it is a tensor."""
        seen = broadcast(value, view.dims)
        if seen is None:
            return None
        return replace(self.found(seen, view.node), negated=negated)

    def stripped(self, view: View, whole: bool = False) -> View:
        """Go back through what only changes layout or dtype, and through negations.

        With `whole`, the numbers are counts: casts to integers keep them, narrow dtypes may not.
        """
        while True:
            if whole and not _has_dtype(view.node, _HOLD_COUNTS):
                raise Unproven(view.node, "its dtype cannot hold large counts of tokens")
            below = through_layout(view) or self._picked(view) or self._unnegated(view)
            if below is None and whole and op_name(view.node) in _TO_WHOLE and is_whole(view.node):
                below = view.of(cast(Node, view.node.args[0]), view.dims)
            if below is None:
                return view
            view = self.found(below, view.node)

    def _picked(self, view: View) -> View | None:
        """Go back from one row, `x[0]`, or to one of what was stacked."""
        node = view.node
        row = row_read(node)
        if row is not None:
            source = cast(Node, node.args[0])
            return view.of(source, ((self.pin(shape_of(source)[0], row),), *view.dims))
        dim = stacked_along(node)
        index = pinned(view.dims[dim]) if dim is not None else None
        if dim is None or index is None:
            return None
        one = cast(tuple[Node, ...], node.args[0])[index]
        return view.of(one, (*view.dims[:dim], *view.dims[dim + 1 :]))

    def _unnegated(self, view: View) -> View | None:
        """Go back from `~mask` or `1 - mask`."""
        name, args = op_name(view.node), view.node.args
        if name in _NEGATIONS and is_bool(view.node):
            return self.operand(args[0], view, not view.negated)
        if name in SUBTRACTS and number(args[0]) == 1 and not view.node.kwargs:
            mask = self.operand(args[1], view, not view.negated)
            return mask if mask and self.is_mask(mask) else None
        return None

    def factors(self, view: View) -> tuple[tuple[View, ...], frozenset[Axis]] | None:
        """Take one product apart, or a choice between something and nothing.

        Gives what the product sums over too; None if it is no product.
        """
        node, name, args = view.node, op_name(view.node), cast(tuple[Any, ...], view.node.args)
        if view.negated:
            return None
        operands = contracted(view, self.bound)
        if operands is not None:
            for one in operands:
                self.read(one.node, node)
            return operands, frozenset[Axis]().union(*(one.axes for one in operands)) - view.axes
        chosen: tuple[tuple[Any, bool], ...] = ()
        product = name in _MULTIPLIES or (name in _CONJUNCTIONS and is_bool(node))
        if product and len(args) == 2 and not node.kwargs:
            chosen = ((args[0], False), (args[1], False))
        elif name == "masked_fill" and len(args) == 3 and number(args[2]) == 0:
            chosen = ((args[0], False), (args[1], True))
        elif name == "where" and len(args) == 3 and number(args[2]) == 0:
            chosen = ((args[0], False), (args[1], False))
        elif name == "where" and len(args) == 3 and number(args[1]) == 0:
            chosen = ((args[0], True), (args[2], False))
        seen = [self.operand(arg, view, negated) for arg, negated in chosen]
        found = tuple(one for one in seen if one is not None)
        return (found, frozenset()) if len(found) == 2 else None

    def summand(self, view: View, along: Dim = ()) -> tuple[View, frozenset[Axis]] | None:
        """Give what a `sum` adds up, and the axes that it runs over.

        A sum over a dimension as long as `along` is taken to run along it.
        """
        node = view.node
        if op_name(node) != "sum" or view.negated or tensor_of(node.args[0]) is None:
            return None
        source, summed, kept = _reduction(node)
        axes: list[Axis] = []
        dims: list[Dim] = []
        outer = iter(view.dims)
        for index, size in enumerate(shape_of(source)):
            if index not in summed:
                dims.append(next(outer))
                continue
            own = (self.bound.setdefault((node, index), Axis(size)),)
            fits = along and same(size, size_along(along)) and not view.axes.intersection(along)
            dims.append(along if fits else own)
            axes += dims[-1]
            if kept:
                next(outer)
        return self.found(View(source, tuple(dims)), node), frozenset(leaves(axes))

    def tested(self, view: View) -> View | None:
        """Go back from `x.bool()`, `x.to(torch.bool)` and `x != 0`."""
        node, name = view.node, op_name(view.node)
        if view.negated or not is_bool(node):
            return None
        unequal = name in ("ne", "not_equal") and number(node.args[1]) == 0
        return self.operand(node.args[0], view) if unequal or name in _TESTS else None

    def is_mask(self, view: View) -> bool:
        """Tell whether a value is zero or one."""
        view = self.stripped(view)
        node, args = view.node, cast(tuple[Any, ...], view.node.args)
        if is_bool(node) or op_name(node) == "one_hot" or self.several(view):
            return True
        if op_name(node) == "setitem":
            return not isinstance(args[2], Node) and args[2] in (0, 1)
        if op_name(node) == "getitem" and tensor_of(args[0]) is not None:
            return self.is_mask(View(args[0], ((),) * len(shape_of(args[0]))))
        if op_name(node) in _SCATTERS and len(args) == 4 and op_name(args[0]) in ZEROS:
            self.read(args[0], node)
            return number(args[3]) == 1
        parts = self.factors(view)
        return parts is not None and not parts[1] and all(map(self.is_mask, parts[0]))

    def several(self, view: View) -> View | None:
        """Give the ids of `one_hot(ids).sum(1)`, zero or one as a token's ids differ."""
        inside = self.summand(view)
        mask = self.stripped(inside[0]) if inside else None
        if not inside or not mask or op_name(mask.node) != "one_hot":
            return None
        ids = View(cast(Node, mask.node.args[0]), mask.dims[:-1])
        self.read(ids.node, mask.node)
        return ids if ids.axes >= inside[1] and self.differ(ids, inside[1]) else None

    def differ(self, ids: View, along: frozenset[Axis]) -> bool:
        """Tell whether ids are known to differ along some axes, as those of one top-k do."""
        ids = self.stripped(ids)
        source, index = (*ids.node.args, None, None)[:2]
        if op_name(ids.node) != "getitem" or index != 1 or not isinstance(source, Node):
            return False
        if not along <= ids.axes:
            return False
        dim = source.kwargs.get("dim", (*source.args, -1)[2] if len(source.args) > 2 else -1)
        places = [place for place, one in enumerate(ids.dims) if along.intersection(leaves(one))]
        return op_name(source) == "topk" and places == [cast(int, dim) % len(ids.dims)]


_TESTS = {"bool", "to", "type"}


def number(value: Any) -> Extent | None:
    """Give the whole number or expression that a scalar argument stands for, or None."""
    if isinstance(value, Node):
        value = value.meta.get("example_value")
    if isinstance(value, torch.SymFloat):
        traced = cast(Any, value.node).expr
        return traced.args[0] if traced.func.__name__ == "ToFloat" else None
    if isinstance(value, float):
        return sympy.Integer(int(value)) if value.is_integer() else None
    scalar = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return expression(value) if scalar else None


def is_bool(node: Node) -> bool:
    """Tell whether a node is a tensor of booleans."""
    return _has_dtype(node, (torch.bool,))


def is_whole(node: Node) -> bool:
    """Tell whether a node is a tensor of integers that hold any count."""
    return _has_dtype(node, (torch.int32, torch.int64))


def _has_dtype(node: Node, dtypes: tuple[torch.dtype, ...]) -> bool:
    value = tensor_of(node.args[0] if op_name(node) == "setitem" else node)
    return value is not None and value.dtype in dtypes


def _reduction(node: Node) -> tuple[Node, frozenset[int], bool]:
    """Read a `sum`: of what, over which dimensions, and whether they stay with a size of one."""
    source = cast(Node, node.args[0])
    count = len(shape_of(source))
    given = node.kwargs.get("dim", node.kwargs.get("axis", (*node.args, None)[1]))
    dims = range(count) if given is None else given
    dims = cast(tuple[int, ...], dims if isinstance(dims, (tuple, list, range)) else (dims,))
    kept = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    return source, frozenset(int(dim) % count for dim in dims), bool(kept)


def _storage(value: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(value.untyped_storage())


def _written(node: Node) -> list[StorageWeakRef]:
    """Say what memory a node that mutates may write to."""
    name = op_name(node)
    first = name.endswith("_") or name.startswith("i") or name in ("setitem", "delitem")
    touched = node.args[:1] if first and "out" not in node.kwargs else node.all_input_nodes
    return [_storage(value) for value in map(tensor_of, touched) if value is not None]

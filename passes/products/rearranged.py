"""Go one step back from a value that only rearranges, repeats, selects or adds up another one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch.fx import Node

from moecc.passes.axes import Axis, Dim, deal, leaves, shape_of, tensor_of, through_layout
from moecc.passes.pattern import op_name
from moecc.passes.products.factor import Factor, Half
from moecc.passes.products.selected import (
    FRESH,
    Axes,
    gather,
    getitem,
    index_select,
    scattered,
    unpermuted,
)
from moecc.passes.router.values import argument
from moecc.passes.sizes import same, sympy


def one_step_back(factor: Factor, axes: Axes) -> Factor | None:
    """Give what a value was made of, or None if it was computed."""
    node = factor.node
    view = through_layout(factor.view)
    if view is not None:
        same_type = _dtype(view.node) == _dtype(node) or op_name(node) != "view"
        return factor.back(view.node, view.dims) if same_type else None
    name = op_name(node)
    if name == "getitem" and factor.half is None and (half := _half(factor)):
        return half
    if factor.ids is not None:
        return None
    if name in FRESH:
        return unpermuted(factor, axes)
    step = _STEPS.get(name)
    return (
        step(factor, axes) if step and node.args and tensor_of(node.args[0]) is not None else None
    )


def _dtype(node: Node) -> torch.dtype:
    return cast(torch.Tensor, tensor_of(node)).dtype


def _sum(factor: Factor, axes: Axes) -> Factor | None:
    node, source = factor.node, cast(Node, factor.node.args[0])
    count = len(shape_of(source))
    given = argument(node, 1, "dim", node.kwargs.get("axis"))
    if given is None:
        return None
    dims = cast(Sequence[int], given if isinstance(given, (tuple, list)) else (given,))
    summed = {int(dim) % count for dim in dims}
    kept, outer = argument(node, 2, "keepdim", False), iter(factor.view.dims)
    inner: list[Dim] = []
    for dim, size in enumerate(shape_of(source)):
        if dim not in summed or kept:
            inner.append(next(outer))
        if dim in summed:
            inner[dim:] = [(axes.bound.setdefault((node, dim), Axis(size)),)]
    return factor.back(source, tuple(inner))


def _repeat(factor: Factor, axes: Axes) -> Factor | None:
    source = cast(Node, factor.node.args[0])
    own = shape_of(source)
    new = len(factor.view.dims) - len(own)
    dims: list[Dim] = []
    for dim, size, total in zip(
        factor.view.dims[new:], own, shape_of(factor.node)[new:], strict=True
    ):
        inner = _split_off(dim, size, total, copies_first=True)
        if inner is None:
            return None
        dims.append(inner)
    return factor.back(source, tuple(dims))


def _repeat_interleave(factor: Factor, axes: Axes) -> Factor | None:
    node, source = factor.node, cast(Node, factor.node.args[0])
    own, dims = shape_of(source), list(factor.view.dims)
    at: int | None = argument(node, 2, "dim", 0 if len(own) == 1 else None)
    if at is None or tensor_of(argument(node, 1, "repeats")) is not None:
        return None
    inner = _split_off(dims[at], own[at], shape_of(node)[at], copies_first=False)
    if inner is None:
        return None
    dims[at] = inner
    return factor.back(source, tuple(dims))


def _split_off(dim: Dim, size: Any, total: Any, copies_first: bool) -> Dim | None:
    """Take the copies out of a dimension that holds something several times."""
    if same(size, total) or not leaves(dim):
        return dim
    copies = sympy.cancel(total / size)
    parts = deal(leaves(dim), (copies, size) if copies_first else (size, copies))
    return None if parts is None else parts[1 if copies_first else 0]


def _half(factor: Factor) -> Factor | None:
    """Read `w.chunk(2, dim)[i]` of matrices."""
    split, index = cast(tuple[Any, ...], factor.node.args)
    if op_name(split) not in ("chunk", "split") or index not in (0, 1):
        return None
    source, parts = split.args[0], argument(split, 1, "chunks")
    shape = shape_of(source)
    at = int(argument(split, 2, "dim", 0)) % len(shape)
    size = shape_of(factor.node)[at]
    listed = isinstance(parts, (tuple, list))
    if not same(2 * size, shape[at]) or (listed and len(cast(Sequence[Any], parts)) != 2):
        return None
    dims = list(factor.view.dims)
    whole = (Axis(shape[at]),)
    half = Half(index=index, taken=leaves(dims[at]), whole=whole)
    dims[at] = whole
    found = factor.back(source, tuple(dims), half=half)
    return replace(found, path=(*found.path, split))


_STEPS: dict[str, Callable[[Factor, Axes], Factor | None]] = {
    "gather": gather,
    "getitem": getitem,
    "index_add": scattered,
    "index_add_": scattered,
    "index_select": index_select,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "scatter_add": scattered,
    "scatter_add_": scattered,
    "sum": _sum,
    "tile": _repeat,
}

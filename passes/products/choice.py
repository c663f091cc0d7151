"""Show that the experts of a token all differ, because a top-k or a sort chose them."""

from typing import Any, cast

from torch.fx import Node

from moecc.passes.axes import shape_of, tensor_of
from moecc.passes.pattern import op_name
from moecc.passes.router.values import Values, argument, is_last
from moecc.passes.sizes import known


def chosen_from(values: Values, ids: Node) -> int | None:
    """Give n if every row of `ids` holds different numbers of 0..n-1; None if that is not shown."""
    node = values.plain(ids)
    if op_name(node) == "argmax" and is_last(argument(node, 1, "dim"), node.args[0]):
        return _width(node.args[0])
    if op_name(node) != "getitem":
        return None
    source, index = values.operand(node, 0), node.args[1]
    if index == 1:
        return _indices(values, source)
    if not _selects_columns(index):
        return None
    if op_name(source) == "argsort" and is_last(argument(source, 1, "dim", -1), source.args[0]):
        return _width(source.args[0])
    paired = op_name(source) == "getitem" and source.args[1] == 1
    return _indices(values, values.operand(source, 0)) if paired else None


def _indices(values: Values, source: Any) -> int | None:
    """Read the indices that `topk`, `sort` or `max` give beside the values."""
    name = op_name(source)
    place = {"topk": 2, "sort": 1, "max": 1}.get(name)
    if place is None or tensor_of(source) is not None:
        return None
    dim = argument(source, place, "dim", None if name == "max" else -1)
    return _width(source.args[0]) if is_last(dim, source.args[0]) else None


def _selects_columns(index: Any) -> bool:
    """Recognise `[..., :k]` and `[:, :k]`."""
    if not isinstance(index, tuple):
        return False
    *rest, last = cast(tuple[Any, ...], index)
    full = all(one is Ellipsis or one == slice(None) for one in rest)
    return full and isinstance(last, slice) and bool(rest)


def _width(node: Any) -> int | None:
    return known(shape_of(node)[-1])

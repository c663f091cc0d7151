"""Read and write single rows of a tensor: the choices of a token, stacked and written one by one.

    mask[0] *= fits          x = mask[0];  y = x.mul_(fits);  mask[0] = y

A row holds what was last written to it, if every write in between is to a whole row by its number.
"""

from typing import Any, cast

import torch
from torch.fx import Node

from moecc.passes.axes import Dim, leaves, shape_of, tensor_of
from moecc.passes.pattern import op_name
from moecc.passes.sizes import expression, same, same_shape

_MULTIPLY = {"imul", "mul_"}


def pinned(dim: Dim) -> int | None:
    """Give the index that a dimension is looked at, if it is only one."""
    own = leaves(dim)
    return own[0].at if len(own) == 1 else None


def row_read(node: Node) -> int | None:
    """Give the row that `x[0]` or `x[0, ...]` is, if it is one of a tensor."""
    return _row(node) if op_name(node) == "getitem" else None


def row_written(write: Node, whole: Node) -> int | None:
    """Give the row of `whole` that a node writes to; None if it writes anything else.

    The rows of a tensor that was expanded may be one in memory.
    """
    name, value = op_name(write), tensor_of(whole)
    if value is None or not _is_dense(value):
        return None
    if name == "setitem" and write.args[0] is whole:
        put, row = write.args[2], _row(write)
        shape = shape_of(whole)[1:]
        own = tensor_of(put)
        if own is None:
            return row if not isinstance(put, Node) else None
        alike = own.dtype is value.dtype and same_shape(shape_of(cast(Node, put)), shape)
        return row if alike else None
    target = (*write.args, None)[0]
    if name not in _MULTIPLY or not isinstance(target, Node) or target.args[:1] != (whole,):
        return None
    return row_read(target)


def value_written(write: Node) -> Node:
    """Give what a row holds after a write: a value, or for a constant the write itself."""
    if op_name(write) != "setitem":
        return write
    value = write.args[2]
    return value if isinstance(value, Node) else write


def stacked_along(node: Node) -> int | None:
    """Give the dimension that a `stack` makes."""
    if op_name(node) != "stack" or not node.args or not isinstance(node.args[0], (list, tuple)):
        return None
    dim = cast(int, node.kwargs.get("dim", (*node.args, 0)[1]))
    return dim % len(shape_of(node))


def _row(node: Node) -> int | None:
    source, index = cast(tuple[Any, Any], node.args[:2])
    first, *rest = cast(tuple[Any, ...], index if isinstance(index, tuple) else (index,))
    whole = all(one is Ellipsis or one == slice(None) for one in rest)
    shape = shape_of(source) if isinstance(source, Node) else ()
    if not shape or not whole or type(first) is not int or not shape[0].is_number:
        return None
    return first % int(shape[0])


def _is_dense(value: torch.Tensor) -> bool:
    """Tell whether no two indices share memory, whatever the order of the dimensions is."""
    pairs = zip(map(expression, value.shape), map(expression, value.stride()), strict=True)
    left = [(size, stride) for size, stride in pairs if size != 1]
    step = expression(1)
    while left:
        found = next((pair for pair in left if same(pair[1], step)), None)
        if found is None:
            return False
        left.remove(found)
        step = step * found[0]
    return True

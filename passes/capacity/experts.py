"""Take the two products of a dispatched block apart, whatever they are written with."""

from dataclasses import dataclass
from itertools import permutations
from typing import Any, cast

from torch.fx import Node

from moecc.passes.axes import (
    Axis,
    Bound,
    View,
    broadcast,
    contracted,
    leaves,
    multiplied,
    shape_of,
    through_layout,
)
from moecc.passes.pattern import op_name

_ADDS = {"add", "iadd", "add_"}
_TURNS = {"permute", "transpose", "t", "swapaxes", "swapdims", "getattr"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Rows [.., e, .., inputs] by matrices [e, inputs, outputs], and a bias."""

    rows: View
    matrices: Node
    """[E, outputs, inputs], or [E, inputs, outputs] when `input_major`."""
    input_major: bool
    bias: Node | None
    """[E, outputs], or what is so when it is reshaped."""
    expert: Axis
    path: tuple[Node, ...]
    """Every node from the result back to the product itself."""


def operands_of(view: View, bound: Bound) -> tuple[tuple[View, ...], tuple[Node, ...]] | None:
    """Go back to a product of two: its operands, and the nodes on the way."""
    path = [view.node]
    while (below := through_layout(view)) is not None:
        view = below
        path.append(view.node)
    operands = contracted(view, bound)
    return (operands, tuple(path)) if operands is not None and len(operands) == 2 else None


def product_of(view: View, output: Axis, bound: Bound) -> Product | None:
    """Read rows times matrices of their experts that have `output`, with or without a bias."""
    path: list[Node] = []
    while (below := through_layout(view)) is not None:
        path.append(view.node)
        view = below
    node, args = view.node, cast(tuple[Any, ...], view.node.args)
    if op_name(node) == "baddbmm" and len(args) == 3 and not node.kwargs:
        bias, operands = broadcast(args[0], view.dims), multiplied(view, args[1], args[2], bound)
        return _product(view, operands, (*path, node), bias, output) if bias and operands else None
    if op_name(node) not in _ADDS or len(args) != 2 or node.kwargs:
        read = operands_of(view, bound)
        return _product(view, read[0], (*path, *read[1]), None, output) if read else None
    for one, other in permutations(args):
        product, bias = broadcast(one, view.dims), broadcast(other, view.dims)
        read = operands_of(product, bound) if product and bias else None
        found = read and _product(view, read[0], (*path, node, *read[1]), bias, output)
        if found:
            return found
    return None


def _product(
    view: View, operands: tuple[View, ...], path: tuple[Node, ...], bias: View | None, output: Axis
) -> Product | None:
    for rows, matrices in permutations(operands):
        experts = rows.axes & matrices.axes & view.axes
        inner = rows.axes & matrices.axes - view.axes
        if len(experts) != 1 or len(inner) != 1 or output not in matrices.axes:
            continue
        (expert,), (summed,) = experts, inner
        turned = _unturned(matrices)
        order = tuple(leaves(dim) for dim in turned.dims)
        if order not in (((expert,), (summed,), (output,)), ((expert,), (output,), (summed,))):
            continue
        bias_node = vector_of(bias, expert, output) if bias is not None else None
        if leaves(rows.dims[-1]) != (summed,) or (bias is None) != (bias_node is None):
            continue
        return Product(
            rows=rows,
            matrices=turned.node,
            input_major=order[1] == (summed,),
            bias=bias_node,
            expert=expert,
            path=path,
        )
    return None


def _unturned(view: View) -> View:
    """Go back to matrices as they are stored."""
    while op_name(view.node) in _TURNS and (below := through_layout(view)) is not None:
        view = below
    return view


def vector_of(view: View, expert: Axis, output: Axis) -> Node | None:
    """Give what lies as [E, outputs], but for dimensions of one."""
    while True:
        axes = tuple(axis for dim in view.dims for axis in leaves(dim))
        below = through_layout(view)
        if axes != (expert, output):
            return None
        if len(shape_of(view.node)) == 2 or below is None:
            return view.node
        view = cast(Any, below)

"""Read running counts over a mask, which may leave the token itself out.

    cumsum(mask, d)
    cumsum(pad(mask, 1 before, -1 behind), d)
    cumsum(pad(mask, 1 before), d)[.., :-1, ..]

The last two are `cumsum(mask, d) - mask`: padding moves every one to the next token, and the last
count, which no token comes behind, is cut off.
"""

from typing import Any, cast

from torch.fx import Node

from moecc.passes.axes import View, shape_of, tensor_of
from moecc.passes.capacity.dataflow import Dataflow, number
from moecc.passes.pattern import op_name
from moecc.passes.sizes import same_shape


def counted(flow: Dataflow, view: View) -> tuple[View, int, int] | None:
    """Give what a count is over, along which dimension, and what is to be added where it is one.

    None if a node is no count over one dimension.
    """
    node = view.node
    if op_name(node) == "getitem":
        total, dim = node.args[0], _without_last(node)
        if not isinstance(total, Node) or op_name(total) != "cumsum" or tensor_of(total) is None:
            return None
        padded = _operand(flow, total)
        if dim is None or padded is None or _along(total) != dim or _moved(padded) != (dim, 0):
            return None
        flow.read(total, node)
        return _inside(flow, padded, view, dim)
    dim = _along(node)
    source = _operand(flow, node) if op_name(node) == "cumsum" and dim is not None else None
    if source is None or dim is None:
        return None
    if _moved(source) == (dim, -1):
        return _inside(flow, source, view, dim)
    return View(source, view.dims), dim, 0


def _inside(flow: Dataflow, padded: Node, view: View, dim: int) -> tuple[View, int, int] | None:
    """Give the mask that was padded, over the axes of the count."""
    mask = _operand(flow, padded)
    if mask is None or not same_shape(shape_of(mask), shape_of(view.node)):
        return None
    return View(mask, view.dims), dim, -1


def _operand(flow: Dataflow, node: Node) -> Node | None:
    source = (*node.args, None)[0]
    if not isinstance(source, Node) or tensor_of(source) is None:
        return None
    flow.read(source, node)
    return source


def _along(node: Node) -> int | None:
    """Give the dimension of a running sum."""
    dim = node.kwargs.get("dim", (*node.args, None)[1])
    return dim % len(shape_of(node)) if isinstance(dim, int) else None


def _moved(node: Node) -> tuple[int, int] | None:
    """Read a pad by one zero before a single dimension: which, and what it adds behind."""
    if op_name(node) != "pad":
        return None
    mode, value = (*node.args[2:], None, None)[:2]
    mode, value = node.kwargs.get("mode", mode), node.kwargs.get("value", value)
    widths = cast(Any, node.kwargs.get("pad", (*node.args, None)[1]))
    zeros = mode in (None, "constant") and (value is None or number(value) == 0)
    if not zeros or not isinstance(widths, (tuple, list)):
        return None
    widths = cast(tuple[Any, ...], widths)
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    padded = [place for place, pair in enumerate(pairs) if pair != (0, 0)]
    if len(padded) != 1 or pairs[padded[0]][0] != 1:
        return None
    return len(shape_of(node)) - 1 - padded[0], pairs[padded[0]][1]


def _without_last(node: Node) -> int | None:
    """Give the dimension of which `x[.., :-1, ..]` leaves the last index out, and no other."""
    source, index = cast(tuple[Any, Any], node.args)
    if tensor_of(source) is None:
        return None
    parts = cast(tuple[Any, ...], index if isinstance(index, tuple) else (index,))
    rank, whole = len(shape_of(source)), slice(None)
    if any(part is not Ellipsis and not isinstance(part, slice) for part in parts):
        return None
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        parts = (*parts[:place], *[whole] * (rank - len(parts) + 1), *parts[place + 1 :])
    cut = [place for place, part in enumerate(parts) if part != whole]
    if len(cut) != 1 or parts[cut[0]] not in (slice(None, -1), slice(0, -1)):
        return None
    return cut[0]

"""Bound what tokens are weighed with: never below zero, never above one.

A straight-through dispatch tensor is `x + c - c.detach()`, for x the zeros and ones of where the
combine tensor c is not zero. It has the gradient of c, and the value of x up to rounding:

    x = 0    0 + c - c = 0 exactly: no other token enters a slot
    x = 1    1 + c is off by eps / 2 at most for 0 <= c <= 1, and so is what is left of it: 1 +- eps

In the dtype of the experts, a token enters two roundings away from itself, as it does from any
other operation of the model. That counts as equal. In a narrower one, or for a weight that may be
larger (1 + 1 / eps has lost its one), it does not, and the block is left alone.
"""

from typing import Any, cast

import torch
from torch.fx import Node

from moecc.passes.axes import View, leaves, over_own_axes, shape_of, tensor_of, through_layout
from moecc.passes.capacity.dataflow import ADDS, SUBTRACTS, Dataflow, Unproven
from moecc.passes.capacity.terms import Term
from moecc.passes.pattern import op_name

_POSITIVE = {"softmax", "sigmoid", "exp", "relu", "square", "abs", "one_hot"}
_KEEP_SIGN = {"sum", "einsum", "matmul", "max", "amax", "gather", "getitem", "topk", "cumsum"}
_ELEMENTWISE = {"mul", "imul", "add", "iadd", "div", "truediv", "itruediv"}


_SHARES = {"softmax", "sigmoid"}
_SELECTS = {"topk", "max"}
_DIVIDES = {"div", "truediv", "itruediv", "div_"}


def around(flow: Dataflow, view: View, entry: Node) -> tuple[View, View] | None:
    """Take `x + c - c` apart into x and c; `entry` is the product that it enters."""
    plain = len(view.node.args) == 2 and not view.node.kwargs and not view.negated
    if op_name(view.node) not in SUBTRACTS or not plain:
        return None
    total, taken = (flow.operand(arg, view) for arg in view.node.args)
    if total is None or taken is None or op_name(total.node) not in ADDS or total.node.kwargs:
        return None
    parts = [flow.operand(arg, total) for arg in total.node.args]
    taken = _attached(flow, taken)
    for kept, added in (parts, parts[::-1]) if len(parts) == 2 else ():
        if kept is None or added is None or _attached(flow, added).key != taken.key:
            continue
        if not all(_is_as_fine(node, entry) for node in (view.node, total.node, taken.node)):
            why = "what it adds and takes away again is rounded to less than the experts' dtype"
            raise Unproven(view.node, why)
        return kept, taken
    return None


def _attached(flow: Dataflow, view: View) -> View:
    while op_name(view.node) == "detach":
        below = flow.operand(view.node.args[0], view)
        if below is None:
            break
        view = below
    return view


def _is_as_fine(node: Node, other: Node) -> bool:
    """Tell whether a node rounds no coarser than another."""
    values = [tensor_of(node), tensor_of(other)]
    eps = [
        torch.finfo(one.dtype).eps for one in values if one is not None and one.is_floating_point()
    ]
    return len(eps) == 2 and eps[0] <= eps[1]


def check_detour(flow: Dataflow, added: View, term: Term, combine: View) -> None:
    """Raise `Unproven` unless what is added consists of such terms, which are at most one.

    No two of them are in one slot, so that their sum is at most one too.
    """
    if flow.stripped(added).key != flow.stripped(combine).key:
        raise Unproven(added.node, "what is added and taken away is not the combine tensor")
    if term.summed:
        raise Unproven(added.node, "it sums over more than a token's choices")
    for factor in term.factors:
        if not _is_at_most_one(flow, factor):
            why = "it may be above one, and ones are lost where it is added and taken away again"
            raise Unproven(factor.node, why)


def _is_at_most_one(flow: Dataflow, view: View) -> bool:
    """Tell whether a value is between zero and one."""
    view = flow.stripped(view)
    name, args = op_name(view.node), cast(tuple[Any, ...], view.node.args)
    if name in _SHARES or flow.is_mask(view):
        return True
    if name == "getitem" and tensor_of(args[0]) is None and args[1] == 0:
        source = (*args[0].args, None)[0]
        if op_name(args[0]) not in _SELECTS or not isinstance(source, Node):
            return False
        flow.read(source, args[0])
        return _is_at_most_one(flow, over_own_axes(source))
    if name in _DIVIDES and len(args) == 2 and not view.node.kwargs:
        return _is_share(flow, view)
    parts = flow.factors(view)
    return (
        parts is not None and not parts[1] and all(_is_at_most_one(flow, one) for one in parts[0])
    )


def _is_share(flow: Dataflow, view: View) -> bool:
    """Recognise `x / x.sum(d).clamp(min=..)` of what is not negative."""
    part, total = (flow.operand(arg, view) for arg in view.node.args)
    if part is None or total is None:
        return False
    part, total = flow.stripped(part), flow.stripped(total)
    node = total.node
    if op_name(node) in ("clamp", "clamp_min") and not _upper(node):
        low = flow.operand(node.args[0], total)
        total = flow.stripped(low) if low is not None else total
    inside = flow.summand(total)
    if inside is None or not is_positive(flow, part.node):
        return False
    whole = flow.stripped(inside[0])
    pairs = [(leaves(one), leaves(two)) for one, two in zip(whole.dims, part.dims, strict=False)]
    alike = all(one == two or (one and inside[1].issuperset(one)) for one, two in pairs)
    return whole.node is part.node and whole.negated == part.negated and alike


def _upper(node: Node) -> bool:
    """Tell whether a clamp brings large values down."""
    given = node.kwargs.get("max", (*node.args[1:], None, None)[1])
    return op_name(node) == "clamp" and given is not None


def is_positive(flow: Dataflow, value: Any) -> bool:
    """Tell whether a value is nowhere below zero."""
    if not isinstance(value, Node):
        return isinstance(value, (int, float)) and value >= 0
    name = op_name(value)
    if name in _POSITIVE or flow.is_mask(View(value, ((),) * len(shape_of(value)))):
        return True
    if name in _ELEMENTWISE:
        sources = value.args
    elif name in _KEEP_SIGN:
        sources = value.all_input_nodes
    else:
        below = through_layout(over_own_axes(value))
        sources = [below.node] if below else []
    for source in sources:
        if isinstance(source, Node):
            flow.read(source, value)
    return bool(sources) and all(is_positive(flow, source) for source in sources)

"""Recognise tokens that are sorted by expert, counted, and brought back into their own order.

    order   = argsort(ids.view(-1))          sort(ids.view(-1))[1]
    offsets = histc(ids).cumsum(0)           bincount(ids), one_hot(ids).sum(0)
    tokens  = order // K                     arange(T).repeat_interleave(K)[order]
    inverse = argsort(order)                 inverse[order] = arange(T * K)

An order that sorts is a permutation, stable or not, so what is brought back by its inverse is as if
it had never been sorted.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moecc.passes.axes import over_own_axes, shape_of, tensor_of, through_layout
from moecc.passes.pattern import ANY, Match, Mutated, bind, call, either
from moecc.passes.sizes import same, sympy

_ORDER = either(call("argsort", bind("flat")), call("getitem", call("sort", bind("flat")), 1))
_DIVIDED = either(
    call("floordiv|floor_divide", bind("order"), bind("active")),
    call("div", bind("order"), bind("active"), rounding_mode=either("floor", "trunc")),
)
_NUMBERED = call(
    "getitem", call("repeat_interleave", call("arange", ANY), bind("active")), bind("order")
)
_TOKENS = either(_DIVIDED, _NUMBERED)
_INVERSE = either(
    call("argsort", bind("order")),
    call("getitem", call("sort", bind("order")), 1),
    Mutated(
        call("empty_like|zeros_like", ANY),
        call("setitem", ANY, bind("order"), call("arange", ANY)),
    ),
)


def _whole(pattern: Any) -> Any:
    """Match `pattern` through a change to another type, which keeps a count."""
    return either(pattern, call("to|int|long|float|type", pattern))


_COUNTS = either(
    call("histc", bind("counted"), bins=bind("bins"), min=0, max=bind("last")),
    call("bincount", bind("counted"), minlength=bind("bins")),
    call("sum", call("one_hot", bind("counted"), bind("bins")), dim=0),
)
_SORTED = either(
    call("getitem", call("sort", bind("flat")), 0), call("getitem", bind("flat"), bind("order"))
)
_OFFSETS = _whole(call("cumsum", _whole(_COUNTS), dim=either(0, -1)))


_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)
"""What ids and counts of tokens fit into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Where each expert's rows end, once rows are sorted by expert."""

    ids: Node
    """What was counted, as the model has it before any view or sorting."""
    experts: int
    nodes: tuple[Node, ...]


def sorted_ids(order: Any) -> Node | None:
    """Give the flat ids that an index tensor sorts in ascending order, or None."""
    match = Match()
    if not isinstance(order, Node) or not match.find(_ORDER, order):
        return None
    flat = match.bindings["flat"]
    return flat if len(shape_of(flat)) == 1 else None


def token_of(index: Any) -> tuple[Node, Any, tuple[Node, ...]] | None:
    """Read the token of each sorted row: the order, K, and the nodes that say so."""
    return _about_order(_TOKENS, index)


def inverse_of(index: Any) -> tuple[Node, Any, tuple[Node, ...]] | None:
    """Read what undoes an order: the order, None, and the nodes that say so."""
    return _about_order(_INVERSE, index)


def _about_order(pattern: Any, index: Any) -> tuple[Node, Any, tuple[Node, ...]] | None:
    match = Match()
    if not isinstance(index, Node) or not match.find(pattern, index):
        return None
    order = match.bindings["order"]
    if not isinstance(order, Node) or sorted_ids(order) is None:
        return None
    return order, match.bindings.get("active"), tuple(match.nodes)


def groups_of(offsets: Any) -> Groups | None:
    """Read where each expert's rows end."""
    match = Match()
    if not isinstance(offsets, Node) or not match.find(_OFFSETS, offsets):
        return None
    experts, last = match.bindings["bins"], match.bindings.get("last")
    if not isinstance(experts, int) or last not in (None, experts - 1, experts):
        return None
    counted = match.bindings["counted"]
    if any(_dtype(node) not in _EXACT for node in (counted, *match.nodes)):
        return None
    ids = unsorted(counted)
    return Groups(ids=ids, experts=experts, nodes=tuple(match.nodes))


def _dtype(node: Any) -> torch.dtype | None:
    value = tensor_of(node)
    return value.dtype if value is not None else None


def unsorted(ids: Node) -> Node:
    """Go back to what has the same ids, each as often, in the model's own order and shape."""
    while True:
        match = Match()
        if match.find(_SORTED, ids):
            order = match.bindings.get("order")
            if order is not None and sorted_ids(order) is None:
                return ids
            ids = match.bindings["flat"]
            continue
        source = through_layout(over_own_axes(ids))
        if source is None or not same(sympy.prod(shape_of(source.node)), sympy.prod(shape_of(ids))):
            return ids
        ids = source.node

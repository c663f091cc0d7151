"""Show that gates over all experts are zero but for the experts that ids name.

    zeros_like(p).scatter(-1, ids, w)             full_like(l, -inf).scatter(-1, ids, v).softmax(-1)
    (one_hot(ids, E) * w.unsqueeze(-1)).sum(1)    p * zeros_like(p).scatter(-1, ids, 1)

A value is followed back to where ids put something into a constant: everywhere else it is a number,
which every step on the way maps to another one, and in the end to zero. A threshold shows no such
thing: what ties with it passes as well. Routers are taken to be finite: a zero that meets an
infinity or a NaN in a product stays a zero here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Node

from moecc.passes.axes import leaves, shape_of, size_along, tensor_of
from moecc.passes.pattern import op_name
from moecc.passes.products.contraction import Reading
from moecc.passes.products.factor import laid_out
from moecc.passes.router.values import Values, argument, is_last, plain_name
from moecc.passes.sizes import known, same_shape

_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_ONES = {"ones", "ones_like", "new_ones"}
_FULL = {"full": 1, "full_like": 1, "new_full": 2, "fill": 1}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "int", "long", "bool"}


def _vanishes(x: float) -> float | None:
    return 0.0 if x == -math.inf else None


_MAPS: dict[str, Callable[[float], float | None]] = {
    "exp": _vanishes,
    "neg": lambda x: -x,
    "not": lambda x: float(not x),
    "relu": lambda x: max(x, 0.0),
    "sigmoid": _vanishes,
    "softmax": _vanishes,
}
"""What an operation makes of a number; None where that is not worth following."""
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda x, y: x == y,
    "ge": lambda x, y: x >= y,
    "gt": lambda x, y: x > y,
    "le": lambda x, y: x <= y,
    "lt": lambda x, y: x < y,
    "ne": lambda x, y: x != y,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """A value [.., E] that is one number everywhere but at a row's ids."""

    ids: Node
    """[.., K], or without the last dimension where K is one."""
    active: int
    """K."""
    fill: float
    nodes: tuple[Node, ...]
    """What shows it."""


def read_sparse(values: Values, node: Any) -> Sparse | None:
    """Find the ids that a value is sparse by; None if nothing shows that it is."""
    if not isinstance(node, Node) or tensor_of(node) is None:
        return None
    name = plain_name(node)
    if name in _READERS:
        found = _READERS[name](values, node)
    elif name in _MAPS:
        found = _mapped(values, node, _MAPS[name])
    elif name in _COMPARISONS:
        found = _compared(values, node)
    elif name not in _CASTS and values.plain(node) is not node:
        found = _viewed(values, node)
    else:
        found = None
    return replace(found, nodes=(*found.nodes, node)) if found else None


def _viewed(values: Values, node: Node) -> Sparse | None:
    """Read a view that leaves rows of experts as they are."""
    source = values.operand(node, 0)
    whole = same_shape(shape_of(source)[-1:], shape_of(node)[-1:])
    return read_sparse(values, source) if whole else None


def _mapped(values: Values, node: Node, change: Callable[[float], float | None]) -> Sparse | None:
    if plain_name(node) == "softmax" and not is_last(argument(node, 1, "dim"), node):
        return None
    found = read_sparse(values, values.operand(node, 0))
    fill = change(found.fill) if found else None
    return replace(found, fill=fill) if found and fill is not None else None


def _cast(values: Values, node: Node) -> Sparse | None:
    to_bool = tensor_of(node) is not None and node.meta["example_value"].dtype is torch.bool
    return _mapped(values, node, (lambda x: float(x != 0)) if to_bool else _if_whole_or_float(node))


def _if_whole_or_float(node: Node) -> Callable[[float], float | None]:
    floating = node.meta["example_value"].is_floating_point()
    return lambda x: x if floating or (math.isfinite(x) and x.is_integer()) else None


def _compared(values: Values, node: Node) -> Sparse | None:
    limit = argument(node, 1, "other")
    if not isinstance(limit, int | float):
        return None
    return _mapped(values, node, lambda x: float(_COMPARISONS[plain_name(node)](x, limit)))


def _scatter(values: Values, node: Node) -> Sparse | None:
    base, index = values.operand(node, 0), values.operand(node, 2, "index")
    fill, active = _constant(base), known(shape_of(index)[-1])
    rows = same_shape(shape_of(index)[:-1], shape_of(node)[:-1])
    if fill is None or active is None or not rows or not is_last(argument(node, 1, "dim"), node):
        return None
    if node.kwargs.get("reduce") is not None:
        return None
    return Sparse(ids=index, active=active, fill=fill, nodes=(base,))


def _constant(node: Any) -> float | None:
    """Give the one number that a new tensor holds everywhere."""
    if not isinstance(node, Node):
        return float(node) if isinstance(node, int | float) else None
    name = plain_name(node)
    if name in _FULL or name == "tensor":
        value = argument(node, _FULL.get(name, 0), "value" if name == "fill" else "fill_value")
        return float(value) if isinstance(value, int | float) else None
    return 0.0 if name in _ZEROS else 1.0 if name in _ONES else None


def _masked_fill(values: Values, node: Node) -> Sparse | None:
    mask, value = values.operand(node, 1, "mask"), argument(node, 2, "value")
    found, fill = read_sparse(values, mask), _constant(value)
    if found is None or found.fill != 1.0 or fill is None or not _alike(mask, node):
        return None
    return replace(found, fill=fill)


def _where(values: Values, node: Node) -> Sparse | None:
    mask = values.operand(node, 0, "condition")
    found = read_sparse(values, mask)
    if found is None or not _alike(mask, node):
        return None
    place, name = (1, "input") if found.fill else (2, "other")
    fill = _constant(values.operand(node, place, name))
    return None if fill is None else replace(found, fill=fill)


def _mul(values: Values, node: Node) -> Sparse | None:
    for place in (0, 1):
        operand = values.operand(node, place, "other" if place else "input")
        found = read_sparse(values, operand)
        if found is not None and found.fill == 0.0 and _alike(operand, node):
            return found
    return None


def _div(values: Values, node: Node) -> Sparse | None:
    """Read a quotient by a number or by something the same for every expert, as a sum over them."""
    divisor, found = argument(node, 1, "other"), read_sparse(values, values.operand(node, 0))
    even = not isinstance(divisor, Node) or not shape_of(divisor) or shape_of(divisor)[-1] == 1
    return found if found is not None and found.fill == 0.0 and even else None


def _add(values: Values, node: Node) -> Sparse | None:
    """Read a finite value plus a mask of minus infinity."""
    for place in (0, 1):
        operand = values.operand(node, place, "other" if place else "input")
        found = read_sparse(values, operand)
        if found is not None and found.fill == -math.inf and _alike(operand, node):
            return found
    return None


def _alike(one: Node, other: Node) -> bool:
    return same_shape(shape_of(one), shape_of(other))


def _one_hot(values: Values, node: Node) -> Sparse | None:
    """Read a row's one choice."""
    return Sparse(ids=values.operand(node, 0), active=1, fill=0.0, nodes=())


def _one_hot_sum(values: Values, node: Node) -> Sparse | None:
    """Read one-hot choices, weighted or not, added up over a token's choices."""
    for count in (1, 2):
        reading = Reading()
        root = reading.start(node)
        experts, tokens = leaves(root.view.dims[-1]), root.flat[:-1]
        for chain in (chain for cut in reading.cuts(root, count) for chain in cut):
            hot = chain[-1]
            *chosen, last = hot.view.dims
            if op_name(hot.node) != "one_hot" or leaves(last) != experts or not experts:
                continue
            ids = reading.chain(reading.start(cast(Node, hot.node.args[0]), tuple(chosen)))
            choices = tuple(axis for axis in ids[0].flat if axis not in tokens)
            found, active = laid_out(ids, tokens, choices), known(size_along(choices))
            if found is not None and active is not None and {*tokens} <= {*ids[0].flat}:
                nodes = (*hot.path, hot.node, *hot.aids, *found.path, *found.aids)
                return Sparse(ids=found.node, active=active, fill=0.0, nodes=nodes)
    return None


_READERS: dict[str, Callable[[Values, Node], Sparse | None]] = {
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(("sum", "einsum", "matmul", "bmm"), _one_hot_sum),
    "add": _add,
    "div": _div,
    "masked_fill": _masked_fill,
    "mul": _mul,
    "one_hot": _one_hot,
    "scatter": _scatter,
    "where": _where,
}

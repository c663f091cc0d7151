"""Read choices that are dropped after they were made: their weight is zero.

weights = weights * (position_in_expert < capacity)
weights, ids = weights.masked_fill(ids == E, 0), ids.masked_fill(ids == E, 0)
"""

from typing import Any

from torch.fx import Node

from moecc.passes.router.chain import Read
from moecc.passes.router.steps import Capacity, Skip, Step
from moecc.passes.router.values import (
    Values,
    argument,
    is_constant,
    is_last,
    plain_name,
    tensor,
)

_KEPT_IF = {"lt": "<", "le": "≤", "gt": ">", "ge": "≥"}
_KEPT_UNLESS = {"lt": "≥", "le": ">", "gt": "≤", "ge": "<"}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "bool", "int", "long", "view"}
_HOT = {"one_hot", "eq", "scatter"}


def read_dropped_weights(values: Values, node: Node) -> Read | None:
    """Read weights that are zero where a choice is dropped."""
    found = _masked(values, node)
    if found is None or found[3] != 0:
        return None
    kept, mask, keeps, _ = found
    step = _step(values, mask, keeps)
    return (step, kept) if step is not None else None


def read_dropped_ids(values: Values, node: Node) -> Read | None:
    """Read ids of which the dropped ones became some number."""
    found = _masked(values, node)
    if found is None or plain_name(node) == "mul":
        return None
    kept, mask, keeps, _ = found
    step = _step(values, mask, keeps)
    return (step, kept) if step is not None else None


def _masked(values: Values, node: Node) -> tuple[Node, Node, bool, Any] | None:
    """Take a mask off: what is under it, the mask, whether true keeps, and what the rest is."""
    name = plain_name(node)
    first, second = values.operand(node, 0), values.operand(node, 1, "other")
    if name == "masked_fill":
        kept, mask, keeps, rest = first, second, False, argument(node, 2, "value")
    elif name == "where" and isinstance(second, Node):
        kept, mask, keeps, rest = second, first, True, argument(node, 2, "other")
    elif name == "where":
        kept, mask, keeps, rest = values.operand(node, 2, "other"), first, False, second
    elif name == "mul" and isinstance(first, Node) and isinstance(second, Node):
        pair = (first, second) if _is_comparison(values, second) else (second, first)
        kept, mask, keeps, rest = (*pair, True, 0)
    else:
        return None
    if not isinstance(kept, Node) or not isinstance(mask, Node) or isinstance(rest, Node):
        return None
    mask, inverted = _comparison(values, mask)
    return kept, mask, keeps != inverted, rest


def _comparison(values: Values, mask: Node) -> tuple[Node, bool]:
    """Undo casts of a mask; tell whether it is inverted."""
    inverted = False
    while plain_name(mask) in _CASTS | {"not", "unsqueeze", "reshape"}:
        source = values.operand(mask, 0)
        if not isinstance(source, Node):
            break
        inverted ^= plain_name(mask) == "not"
        mask = source
    return mask, inverted


def _is_comparison(values: Values, mask: Node) -> bool:
    return plain_name(_comparison(values, mask)[0]) in {*_KEPT_IF, "eq", "ne"}


def _step(values: Values, mask: Node, keeps: bool) -> Step | None:
    """Say why a mask drops choices: their class has no expert, or their expert is full."""
    name, number = plain_name(mask), argument(mask, 1, "other")
    if name in ("eq", "ne") and isinstance(number, int):
        return Skip(number) if (name == "ne") is keeps else None
    relation = (_KEPT_IF if keeps else _KEPT_UNLESS).get(name)
    position = values.operand(mask, 0)
    if relation is None or not isinstance(position, Node) or not counts(values, position):
        return None
    limit = f"{number:g}" if is_constant(number) else "a share of the tokens"
    return Capacity(f"{relation} {limit}")


def drop_of(values: Values, mask: Node) -> Step | None:
    """Say what a mask of kept choices drops."""
    mask, inverted = _comparison(values, mask)
    return _step(values, mask, not inverted)


def counts(values: Values, position: Node) -> bool:
    """Tell whether a number counts the earlier tokens of the same expert."""
    for one in values.cone(position, limit=40):
        source = values.operand(one, 0) if plain_name(one) == "cumsum" else None
        if isinstance(source, Node) and not is_last(argument(one, 1, "dim"), source):
            return tensor(source) is not None and any(
                plain_name(inner) in _HOT for inner in values.cone(source, limit=12)
            )
    return False

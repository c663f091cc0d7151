"""Read weights that meet a one-hot mask of the chosen experts, as code with capacities writes them.

mask    = one_hot(ids, E) * (position < capacity)
weights = (scores * mask).sum(-1)                 or einsum("te,te->t", scores, mask)
gates   = weights.unsqueeze(-1) * mask            [T, E], zero but for the kept choices
"""

from collections.abc import Iterator
from typing import Any, cast

from torch.fx import Node

from moecc.passes.router.chain import Read
from moecc.passes.router.drops import counts, drop_of
from moecc.passes.router.masks import kept_by
from moecc.passes.router.rows import ids_of_tokens
from moecc.passes.router.steps import Capacity, Step
from moecc.passes.router.values import Unreadable, Values, argument, last_part, plain_name, width

_LAYOUT = {
    "unsqueeze", "squeeze", "view", "reshape", "flatten", "permute", "transpose", "t", "expand",
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "int", "long", "bool",
    "contiguous", "detach", "clone",
}  # fmt: skip
_COMPARISONS = {"lt", "le", "gt", "ge", "ne", "eq", "not"}


def read_hot(values: Values, node: Node, ids: Node) -> Read | None:
    """Read a product with a one-hot mask, or what its sum leaves: the chosen one, or nothing."""
    name = plain_name(node)
    if name == "sum":
        inner = values.operand(node, 0)
        hot = isinstance(inner, Node) and _has_hot(values, inner, ids)
        return (None, inner) if hot else None
    factors = list(_factors(values, node))
    if len(factors) != 2:
        return None
    for kept, mask in (factors, factors[::-1]):
        steps = mask_steps(values, mask, ids)
        if steps is not None and mask_steps(values, kept, ids) is None:
            return _one(steps, node), kept
    return None


def read_layout(values: Values, node: Node) -> Read | None:
    """Read another order or shape of the same numbers."""
    source = values.operand(node, 0)
    adds = plain_name(node) == "getitem" and _only_new(node.args[1])
    turns = isinstance(source, Node) and (plain_name(node) in _LAYOUT or adds)
    return (None, source) if turns else None


def mask_steps(values: Values, mask: Node, ids: Node) -> tuple[Step, ...] | None:
    """Say what a mask of the chosen experts drops: nothing is (); None if it is no such mask."""
    steps: dict[Step, None] = {}
    for leaf in _leaves(values, mask):
        if _is_selection(values, leaf, ids):
            continue
        step = _place(values, leaf) or drop_of(values, leaf)
        if step is None:
            return None
        steps[step] = None
    return tuple(steps)


def hot_ids(values: Values, mask: Node) -> Node | None:
    """Find the ids of a one-hot mask in a product."""
    for leaf in _leaves(values, mask):
        if plain_name(leaf) == "one_hot" and _place(values, leaf) is None:
            source = values.operand(leaf, 0)
            return ids_of_tokens(values, source) if isinstance(source, Node) else None
    return None


def _one(steps: tuple[Step, ...], node: Node) -> Step | None:
    if len(steps) > 1:
        raise Unreadable(node, "choices are dropped for several reasons")
    return next(iter(steps), None)


def _factors(values: Values, node: Node) -> Iterator[Node]:
    name = plain_name(node)
    if name == "mul":
        given: Any = (values.operand(node, 0), values.operand(node, 1, "other"))
    elif name == "einsum":
        given = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        given = [values.at(one, node) for one in given if isinstance(one, Node)]
    else:
        return
    yield from (one for one in given if isinstance(one, Node))


def _leaves(values: Values, node: Node) -> Iterator[Node]:
    """Take a product of masks apart; what is done to the layout does not matter."""
    factors = list(_factors(values, node))
    if factors and plain_name(node) == "mul":
        for factor in factors:
            yield from _leaves(values, factor)
        return
    found = read_layout(values, node)
    if found is None and plain_name(node) == "sum":
        found = None, values.operand(node, 0)
    if found is not None and isinstance(found[1], Node):
        yield from _leaves(values, found[1])
    else:
        yield node


def _has_hot(values: Values, node: Node, ids: Node) -> bool:
    factors = list(_factors(values, node)) or [node]
    return any(mask_steps(values, factor, ids) is not None for factor in factors)


def _is_selection(values: Values, leaf: Node, ids: Node) -> bool:
    if plain_name(leaf) != "one_hot":
        return plain_name(leaf) not in _COMPARISONS and kept_by(values, leaf, True) is ids
    source = values.operand(leaf, 0)
    return isinstance(source, Node) and ids_of_tokens(values, source) is ids


def _place(values: Values, leaf: Node) -> Step | None:
    """Read places in an expert's queue, each of which has a slot if it is small enough."""
    part = last_part(leaf)
    slots, hot = width(leaf), values.operand(leaf, 0) if part is not None else leaf
    if slots is None or not isinstance(hot, Node) or (part is not None and part.start):
        return None
    position, other = values.operand(hot, 0), argument(hot, 1, "other")
    by_number = plain_name(hot) == "eq" and isinstance(other, Node)
    arange = by_number and plain_name(values.plain(other)) == "arange"
    if not isinstance(position, Node) or not (arange or plain_name(hot) == "one_hot"):
        return None
    return Capacity(f"< {slots}") if counts(values, position) else None


def _only_new(index: Any) -> bool:
    every = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
    return all(one is None or one is Ellipsis or one == slice(None) for one in every)

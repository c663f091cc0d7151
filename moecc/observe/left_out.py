"""Check what a rewrite leaves out of a recording.

Numbers alone would not see a rule that the observed inputs never met. So what is left out has to be
made of selections, sums and products, and Python may have decided by ids only, never by a float.
"""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from moecc.observe.counts import cuts_beyond
from moecc.observe.recorder import after
from moecc.observe.stand_ins import expert_result
from moecc.observe.unrecordable import Unrecordable
from moecc.passes.pattern import op_name

if TYPE_CHECKING:
    from moecc.observe.explain import Explanation

_CHOICES = {"topk", "argmax", "argsort", "sort", "max", "argmin", "min", "one_hot", "histc"}
_MAKERS = {
    "zeros", "zeros_like", "empty", "empty_like", "ones", "ones_like", "full", "full_like",
    "arange", "new_zeros", "new_empty", "new_ones", "new_full",
}  # fmt: skip
_LINEAR = _MAKERS | {
    "add", "add_", "after", "bmm", "bfloat16", "cat", "chunk", "clone", "concat", "contiguous",
    "detach", "double", "einsum", "expand", "expand_as", "expert_result", "flatten", "float",
    "gather", "getitem", "half", "index_add", "index_add_", "index_copy", "index_copy_",
    "index_put", "index_put_", "index_select", "masked_scatter", "masked_scatter_", "matmul",
    "mul", "mul_", "multiply", "narrow", "permute", "repeat", "repeat_interleave", "reshape",
    "scatter", "scatter_", "scatter_add", "scatter_add_", "setitem", "split", "squeeze", "stack",
    "sum", "tile", "to", "transpose", "type", "type_as", "unbind", "unflatten", "unsqueeze",
    "view", "view_as", "__iadd__", "__imul__", "__radd__", "__rmul__", "masked_fill",
    "masked_fill_",
}  # fmt: skip
"""Operations that move values, add them or multiply them."""

_ORDERED = {
    "lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal", "__lt__", "__le__",
    "__gt__", "__ge__", "clamp", "clamp_", "clamp_max", "clamp_max_", "clip", "clip_", "minimum",
    "maximum",
}  # fmt: skip


def check_decisions(decisions: list[Node]) -> None:
    """Raise `Unrecordable` if Python went by values other than ids."""
    known: dict[Node, bool] = {}
    for node in decisions:
        if not _by_choice(node, known):
            raise Unrecordable(f"it decides by the values of {node.name}, which are not ids")


def _by_choice(node: Node, known: dict[Node, bool]) -> bool:
    """Tell whether a value depends on the inputs only through sizes and through chosen ids."""
    if node not in known:
        known[node] = _depends_on_ids_only(node, known)
    return known[node]


def _depends_on_ids_only(node: Node, known: dict[Node, bool]) -> bool:
    name, value = op_name(node), node.meta.get("example_value")
    integral = isinstance(value, torch.Tensor) and not value.is_floating_point()
    if node.op == "placeholder":
        return integral
    if node.op == "get_attr" or name in _MAKERS or name in ("size", "numel"):
        return True
    if node.target is getattr:
        return node.args[1] == "shape"
    if name in _CHOICES and integral:
        return True
    if node.target is operator.getitem and isinstance(node.args[0], Node) and integral:
        parent = node.args[0]
        if op_name(parent) in _CHOICES and parent.meta.get("example_value") is None:
            return True
    if name in ("nonzero", "argwhere") or (name == "where" and len(node.args) == 1):
        return True  # as the next
    if name in ("gt", "ne", "greater") and len(node.args) > 1 and node.args[1] == 0:
        return True  # an expert whose weight is 0 adds nothing either way
    return all(_by_choice(one, known) for one in node.all_input_nodes)


def check_left_out(
    nodes: list[Node], found: "Explanation", results: Sequence[Node], decisions: Sequence[Node]
) -> None:
    """Hold what the rewrite will not run to moving, adding and multiplying values.

    `decisions` are the nodes that Python went by.

    Raises `Unrecordable`.
    """
    kept = _upstream([found.hidden, *found.routing.nodes()], set())
    kept |= _upstream(results, {found.output})
    kept.discard(found.output)
    if any(node.target is expert_result for node in kept):
        raise Unrecordable("an expert's result is used for something else than the weighted sum")
    dropped = _upstream([found.output], kept) - kept
    _check_rules(dropped | (_upstream(decisions, kept) - kept))
    known: dict[Node, bool] = {}
    for node in nodes:
        if node not in dropped or (node.op != "call_function" and node.op != "call_method"):
            continue
        plain = not isinstance(node.meta.get("example_value"), torch.Tensor)
        if plain or op_name(node) in _LINEAR or node.target is after or _by_choice(node, known):
            continue
        raise Unrecordable(f"between the experts and their sum it calls {op_name(node)}")


def _check_rules(nodes: set[Node]) -> None:
    """Raise `Unrecordable` at a capacity: the observed inputs may be too few to come to it."""
    for node in nodes:
        if cuts_beyond(node):
            raise Unrecordable(
                "between the experts and their sum it cuts off what is beyond a number"
            )
        others = (*node.args[1:], *node.kwargs.values())
        numbers = [one for one in others if isinstance(one, (int, float)) and one not in (0, 1)]
        if op_name(node) in _ORDERED and numbers:
            raise Unrecordable(f"between router and sum it compares something with {numbers[0]}")


def _upstream(ends: Sequence[Node], stop: set[Node]) -> set[Node]:
    """Collect everything that `ends` are computed from, up to and with `stop`."""
    found, waiting = set[Node](), list(ends)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                waiting += node.all_input_nodes
    return found

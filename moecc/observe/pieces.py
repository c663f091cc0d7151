"""Follow one expert's rows through code that puts all experts' rows together between two products.

    parts = [F.linear(x, self.wide[e]) for e, x in enumerate(rows.split(counts))]
    every = act(torch.cat(parts))
    parts = [F.linear(x, self.narrow[e]) for e, x in enumerate(every.split(counts))]

A piece of `every` is `act` of the same piece of what was put together, so it is written as that.
"""

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from moecc.codegen.activation import OPERATIONS
from moecc.passes.pattern import op_name

_ELEMENTWISE = {
    *OPERATIONS, "clamp", "clip", "multiply", "pow", "swish", "to", "float", "bfloat16", "half",
    "type", "type_as", "dropout", "__mul__", "__rmul__", "__add__", "__radd__",
}  # fmt: skip


def push_splits_through(graph: Graph) -> None:
    """Write every piece of a split of something elementwise as that of the pieces put together."""
    for node in list(graph.nodes):
        if node.target is not operator.getitem or not isinstance(node.args[0], Node):
            continue
        split, number = node.args
        if op_name(split) != "split" or not isinstance(number, int):
            continue
        pieces = _sizes(split)
        start = sum(pieces[:number])
        with graph.inserting_before(node):
            piece = _piece(cast(Node, split.args[0]), number, pieces, start, {})
        if piece is not None and piece is not node:
            node.replace_all_uses_with(piece)


def _sizes(split: Node) -> list[int]:
    """Give the sizes along the first dimension; none if it was split along another."""
    counts = {user.args[1]: _rows(user) for user in split.users if user.target is operator.getitem}
    sizes = [counts.get(number, -1) for number in range(len(counts))]
    source = split.args[0]
    whole = isinstance(source, Node) and sum(sizes) == _rows(source) and -1 not in sizes
    return sizes if whole else []


def _rows(node: Node) -> int:
    value = node.meta.get("example_value")
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else -1


def _piece(
    node: Node, number: int, sizes: list[int], start: int, known: dict[Node, Node | None]
) -> Node | None:
    """Write piece `number` of a node, or give None where that cannot be followed."""
    if node in known:
        return known[node]
    known[node] = None
    args = cast(list[Any], [*node.args])
    if op_name(node) in ("cat", "concat", "concatenate") and args:
        parts = cast(Sequence[Any], args[0])
        along = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
        fits = along == 0 and sizes and [_rows(part) for part in parts] == sizes
        known[node] = parts[number] if fits else None
    elif op_name(node) in _ELEMENTWISE or _takes_half(node):
        known[node] = _copied(node, number, sizes, start, known)
    return known[node]


def _takes_half(node: Node) -> bool:
    """Tell whether a node is a chunk of the last dimension, or one of the chunks."""
    if op_name(node) == "getitem":
        return isinstance(node.args[0], Node) and _takes_half(node.args[0])
    along = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    return op_name(node) == "chunk" and along in (-1, 1)


def _copied(
    node: Node, number: int, sizes: list[int], start: int, known: dict[Node, Node | None]
) -> Node | None:
    pieces = {one: _piece(one, number, sizes, start, known) for one in node.all_input_nodes}
    if None in pieces.values():
        return None
    copy = node.graph.node_copy(node, lambda one: cast(Node, pieces[one]))
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        copy.meta["example_value"] = value[start : start + sizes[number]]
    return copy

"""Find where a graph can be cut in two with few values crossing: between a decoder's layers.

x ─┬─ norm ─ attention ─ add ─┬─ norm ─ experts ─ add ─┬─ ...
   └───────────────────────┘  └─────────────────────┘
   ^ one value crosses        ^ here                   ^ and here; elsewhere it is two or more
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.fx import Node

from moecc.passes.parameters import GIVEN
from moecc.passes.pattern import op_name

_REACH = 10
"""Nodes to each side that a border has the fewest crossing values of: a norm is shorter."""
_LONG = 3
"""Values alive for a third of the graph (rotary tables, masks) cross borders alike; they and
constants are not counted."""

_LEVELS = 4
"""Ways to cut that are given: layers differ in how many values they hand on."""


def computed(graph: torch.fx.Graph) -> list[Node]:
    """List what a graph computes, in order: everything but its inputs, constants and result."""
    return [node for node in graph.nodes if node.op not in (*GIVEN, "output")]


def borders(nodes: Sequence[Node]) -> list[list[int]]:
    """Give positions in `nodes` before which a graph is best cut, in several ways.

    First where the fewest values cross, then where more do as well. What crosses is a tensor or a
    size, and no scope (autocast, vmap) is open. Linear time.
    """
    place = {node: number for number, node in enumerate(nodes)}
    size = len(nodes)
    starts, closed = [0] * (size + 1), [0] * (size + 1)
    for number, node in enumerate(nodes):
        readers = [place[user] for user in node.users if user in place]
        last = max(readers, default=number)
        if not isinstance(node.meta.get("example_value"), (torch.Tensor, torch.SymInt)):
            _mark(closed, number, max(last, size if _leaves(node, place) else 0))
        if node.all_input_nodes and last - number < max(size // _LONG, 2 * _REACH):
            _mark(starts, number, last)
    crossing, shut = list(accumulate(starts)), list(accumulate(closed))
    depths = list(accumulate(map(_opened, nodes), initial=0))
    found = [
        at
        for at in range(1, size)
        if not shut[at]
        and not depths[at]
        and crossing[at] < max(crossing[at - 1 : at + 2])
        and crossing[at] <= min(crossing[max(at - _REACH, 1) : min(at + _REACH + 1, size)])
    ]
    levels = sorted({crossing[at] for at in found})[:_LEVELS] or [0]
    return [
        sorted({_behind_idle(nodes, at) for at in found if crossing[at] <= level})
        for level in levels
    ]


def _mark(counts: list[int], start: int, last: int) -> None:
    """Add one to every position between the node that makes a value and its last reader."""
    if last > start:
        counts[start + 1] += 1
        counts[min(last + 1, len(counts) - 1)] -= 1


def _leaves(node: Node, place: dict[Node, int]) -> bool:
    return any(user not in place for user in node.users)


def _behind_idle(nodes: Sequence[Node], at: int) -> int:
    """Skip calls that read nothing and that nothing reads: torch logs first uses of modules."""
    while at < len(nodes) - 1 and not nodes[at].all_input_nodes and not nodes[at].users:
        at += 1
    return at


def _opened(node: Node) -> int:
    """Tell whether a node opens (1) or closes (-1) a scope for those behind it."""
    name = op_name(node)
    if name.startswith("_enter_") or name.endswith("_increment_nesting"):
        return 1
    return -(name.startswith("_exit_") or name.endswith("_decrement_nesting"))

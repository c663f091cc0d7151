"""Follow values backward and forward through a graph: cones, and the residual stream of a block.

x  ──────────────────────────┐
└─ attention ─ add ── r ─────┤             r: the residual stream as block l finds it
                      ├─ norm ─ router ─ ids ─┐
                      │   └──── hidden ─ experts ─ out
                      └───────────────────────── add ── x of the next layer
"""

from collections.abc import Iterable

import torch
from torch.fx import Node

from moecc.passes.pattern import mutates, op_name
from moecc.passes.sizes import same_shape

_FEW = 8
"""Nodes that make a constant of a graph's inputs, such as the epsilon of a norm."""
_ADDS = {"add", "iadd", "add_"}


def ancestors(node: Node) -> set[Node]:
    """List everything that a node is computed from, itself included."""
    seen, queue = {node}, [node]
    while queue:
        for before in queue.pop().all_input_nodes:
            if before not in seen:
                seen.add(before)
                queue.append(before)
    return seen


def descendants(start: Node) -> set[Node]:
    """List everything that is computed from a node, without itself."""
    behind = {start}
    for node in _after(start):
        if any(one in behind for one in node.all_input_nodes):
            behind.add(node)
    return behind - {start}


def cone(end: Node, start: Node, place: Node) -> list[Node] | None:
    """List what `start` goes through to become `end`, in the order of the graph, `end` included.

    It can then be copied to `place`. None if `end` is not made of `start`, or also of something
    that is not there yet at `place`, or if what lies between writes to something outside.
    """
    order = {node: number for number, node in enumerate(end.graph.nodes)}
    inside = ancestors(end) & descendants(start)
    if end not in inside:
        return None
    early = order[place]
    late = {one for node in inside for one in node.all_input_nodes if order[one] >= early}
    for node in late - inside - {start}:
        made = {one for one in ancestors(node) if one.op not in ("placeholder", "get_attr")}
        if len(made) > _FEW:
            return None
        inside |= {one for one in made if order[one] >= early}
    if any(mutates(node) and node.args[0] not in inside for node in inside):
        return None
    return sorted(inside, key=order.__getitem__)


def residual_of(hidden: Node, output: Node) -> Node | None:
    """Find what a block's output is added to: the residual stream that its hidden state comes from.

    `hidden` enters the experts, `output` leaves them. None if the output is not added to anything
    that `hidden` is made of.
    """
    before = ancestors(hidden)
    made = {output}
    for node in _after(output):
        if not any(one in made for one in node.all_input_nodes):
            continue
        made.add(node)
        if op_name(node) not in _ADDS or len(node.args) < 2:
            continue
        for one in node.args[:2]:
            if isinstance(one, Node) and one in before and one not in made and _alike(one, node):
                return one
    return None


def _alike(one: Node, other: Node) -> bool:
    left, right = one.meta.get("example_value"), other.meta.get("example_value")
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    return same_shape(left.shape, right.shape)


def _after(node: Node) -> Iterable[Node]:
    """List the nodes behind one, in order."""
    one = node.next
    while one.op != "root":
        yield one
        one = one.next

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


def cone(end: Node, start: Node) -> list[Node] | None:
    """List what lies between `start` and `end`, in the order of the graph, `end` included.

    None if `end` also depends on something else than `start` and the graph's inputs, or if what
    lies between writes to something outside.
    """
    inside: set[Node] = set()
    queue = [end]
    while queue:
        node = queue.pop()
        if node is start or node in inside or node.op in ("placeholder", "get_attr"):
            continue
        inside.add(node)
        queue += node.all_input_nodes
    if not any(start in node.all_input_nodes for node in inside):
        return None
    if not all(_is_fed(node, inside, start) for node in inside):
        return None
    return [node for node in end.graph.nodes if node in inside]


def _is_fed(node: Node, inside: set[Node], start: Node) -> bool:
    if mutates(node) and node.args[0] not in inside:
        return False
    known = (start, *inside)
    return bool(node.all_input_nodes) and all(
        one in known or one.op in ("placeholder", "get_attr") for one in node.all_input_nodes
    )


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

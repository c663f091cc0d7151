"""Rule out, at little cost, the nodes that no block of products can end at.

A block multiplies by stacked matrices [E, ., .], and at most once more, by the routing weights. So
only what is one or two multiplications away from something three-dimensional is worth reading.
"""

from torch.fx import Graph, Node

from moecc.passes.axes import shape_of
from moecc.passes.pattern import op_name
from moecc.passes.products.contraction import MULTIPLY, PRODUCTS

_FARTHEST = 2
_FLAT = ("linear", "mm")
"""Products that take no stacked matrices."""


def candidates(graph: Graph) -> set[Node]:
    """Give the nodes that stacked matrices may have been multiplied into once or twice."""
    given: set[Node] = set()
    away: dict[Node, frozenset[int]] = {}
    for node in graph.nodes:
        name = op_name(node)
        if name not in PRODUCTS and name != "embedding" and given.issuperset(node.all_input_nodes):
            given.add(node)
        if node in given and sum(size != 1 for size in shape_of(node)) >= 3:
            away[node] = frozenset({0})
            continue
        steps: frozenset[int] = frozenset[int]().union(
            *(away[source] for source in node.all_input_nodes)
        )
        if name in _FLAT:
            steps = frozenset()
        elif name in PRODUCTS or name in MULTIPLY:
            steps = frozenset(one + 1 for one in steps if one < _FARTHEST)
        away[node] = steps
    return {node for node, steps in away.items() if steps - {0}}

"""Describe the router and the shared expert of every block, for reports and for later passes.

Routers and shared experts stay ordinary graph nodes, and nothing depends on a description: what
cannot be read is said in it, and never makes a pass fail.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch.fx import Graph, Node

from moecc.passes.ir import MoeBlock, Route
from moecc.passes.router.chain import unknown
from moecc.passes.router.description import Router
from moecc.passes.router.dispatched import gates_of_ids, read_dispatched, route_of_gates
from moecc.passes.router.read import read_router
from moecc.passes.router.steps import Applied, Unknown
from moecc.passes.router.values import Unreadable, Values
from moecc.passes.shared import After, SharedExpert, read_output
from moecc.passes.source import source_line

SURPRISES = (
    ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, Unreadable,
    ValueError,
)  # fmt: skip
"""What reading arguments raises that are not of the kind that a model usually gives."""


def describe_blocks(graph: Graph, blocks: tuple[MoeBlock, ...]) -> tuple[MoeBlock, ...]:
    """Give the same blocks with `router` and `shared`; takes time in proportion to the graph."""
    if not blocks:
        return blocks
    values, nodes = Values(graph), {node.name: node for node in graph.nodes}
    return tuple(_describe(values, nodes, block) for block in blocks)


def _describe(values: Values, nodes: Mapping[str, Node], block: MoeBlock) -> MoeBlock:
    after, router = _output(values, nodes, block), _router(values, nodes, block)
    weighed = (Applied("the input"),) if block.weighs == "input" else ()
    steps = (*router.steps, *weighed, *after.scales)
    return replace(block, router=replace(router, steps=steps), shared=after.shared)


def _router(values: Values, nodes: Mapping[str, Node], block: MoeBlock) -> Router:
    hidden, ids, weights = (nodes[name] for name in (block.hidden, block.ids, block.weights))
    output = nodes[block.output]
    try:
        routes = [_route(route, nodes) for route in block.routes]
        if gates := gates_of_ids(values, ids):
            routes = [route_of_gates(values, gates)]
        if routes:
            return read_dispatched(values, hidden, routes, output)
        return read_router(values, hidden, ids, weights, output)
    except Unreadable as error:
        return Router(steps=(unknown(error.node, error.why),))
    except SURPRISES as error:
        return Router(steps=(Unknown(output.name, source_line(output), _failure(error)),))


def _route(route: Route, nodes: Mapping[str, Node]) -> tuple[Node, list[Node]]:
    """Give a route's nodes.

    Raises `Unreadable` for one that is the opposite of a mask.
    """
    negated = next((one for one in route.factors if one.negated), None)
    if negated is not None:
        raise Unreadable(nodes[negated.node], "choices are dropped where it is true")
    return nodes[route.ids.node], [nodes[one.node] for one in route.factors]


def _output(values: Values, nodes: Mapping[str, Node], block: MoeBlock) -> After:
    onto = nodes[block.onto] if block.onto is not None else None
    try:
        return read_output(values, nodes[block.hidden], nodes[block.output], onto)
    except SURPRISES as error:
        return After(shared=SharedExpert(unknown=f"{block.output}, {_failure(error)}"))


def _failure(error: Exception) -> str:
    return f"the reader failed with {type(error).__name__}: {error}"

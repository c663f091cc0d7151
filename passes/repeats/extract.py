"""Copy a stretch of a graph into a graph of its own, and call that in its place."""

from collections.abc import Callable, Iterator
from operator import getitem
from typing import cast

from torch.fx import Graph, GraphModule, Node

from moecc.passes.repeats.windows import Window, value_of


def extract(window: Window) -> GraphModule:
    """Make a module of a window: its inputs in order, a tuple of its outputs as the result."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in window.inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in window.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in window.outputs))
    return GraphModule({}, graph)


def replace_by_call(window: Window, add: Callable[[tuple[Node, ...]], Node]) -> None:
    """Erase a window's nodes; `add` makes the node that yields its outputs of its inputs."""
    inside, last = {*window.nodes}, window.nodes[-1]
    with last.graph.inserting_after(last):
        call = after = add(window.inputs)
    call.meta = {**last.meta, "example_value": tuple(map(value_of, window.outputs))}
    for number, output in enumerate(window.outputs):
        with call.graph.inserting_after(after):
            after = call.graph.call_function(getitem, (call, number))
        after.meta = dict(output.meta)
        output.replace_all_uses_with(after, lambda user: user not in inside)
    for node in reversed(window.nodes):
        call.graph.erase_node(node)


def readers(node: Node) -> Iterator[Node]:
    """List what reads a value, in callees too."""
    for user in node.users:
        owner = user.graph.owning_module
        if user.op != "call_module" or owner is None:
            yield user
            continue
        callee = cast(GraphModule, owner.get_submodule(str(user.target)))
        inputs = callee.graph.find_nodes(op="placeholder")
        for number, given in enumerate(user.args):
            if given is node:
                yield from readers(inputs[number])

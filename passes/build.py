"""Write nodes into a graph, each with the example value that later readers of the graph expect."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moecc.passes.sizes import known, same, same_shape

_LABELS = ("stack_trace", "nn_module_stack", "source_fn_stack")
"""What says where in the user's model a node comes from."""


class Builder:
    """Puts nodes in front of one node of a graph."""

    def __init__(self, graph: Graph, before: Node) -> None:
        self._graph = graph
        self._before = before
        self._labels = {key: before.meta[key] for key in _LABELS if key in before.meta}

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        """Add `args[0].name(*args[1:], **kwargs)`."""
        with self._graph.inserting_before(self._before):
            node = self._graph.call_method(name, args, kwargs)

        def run(tensor: Any, *rest: Any, **named: Any) -> Any:
            return getattr(tensor, name)(*rest, **named)

        return self._labelled(node, run)

    def function(
        self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any
    ) -> Node:
        """Add `target(*args, **kwargs)`."""
        with self._graph.inserting_before(self._before):
            node = self._graph.create_node("call_function", target, args, kwargs, name)
        return self._labelled(node, target)

    def _labelled(self, node: Node, compute: Callable[..., Any]) -> Node:
        args, kwargs = map_arg((node.args, node.kwargs), lambda one: one.meta["example_value"])
        with torch.no_grad():
            node.meta = dict(self._labels, example_value=compute(*args, **kwargs))
        return node

    def matrix(self, node: Node, width: int) -> Node:
        """See a node as [-1, width]; one that is so already is given back."""
        shape = node.meta["example_value"].shape
        if len(shape) == 2 and same(shape[1], width):
            return node
        return self.method("reshape", node, -1, width)

    def shaped(self, node: Node, shape: Sequence[int | torch.SymInt]) -> Node:
        """See a node in another shape, whose sizes are numbers or sizes of values before it."""
        if same_shape(node.meta["example_value"].shape, shape):
            return node
        return self.method("reshape", node, *map(self._size, shape))

    def _size(self, size: int | torch.SymInt) -> Any:
        """Give a size as an argument: a number, or a node that computes it."""
        if (number := known(size)) is not None:
            return number
        for node in self._graph.nodes:
            if node is self._before:
                break
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt) and same(value, size):
                return node
            if isinstance(value, torch.Tensor):
                for dim, other in enumerate(value.shape):
                    if same(other, size):
                        return self.method("size", node, dim)
        return -1

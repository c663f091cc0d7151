"""Turn an explained recording into a function of the module's inputs with one call of experts.

ids, weights, ... as recorded
out = experts(hidden [T, H], ids [T, K], weights [T, K], *parameters)
everything after the sum as recorded
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from moecc.observe.explain import Explanation, Routing
from moecc.observe.recorder import Recorder
from moecc.observe.unrecordable import Unrecordable

_HOLDERS = (tuple, list, dict, torch.Tensor, type(None), bool, int, float, str)


def put_experts(recorder: Recorder, found: Explanation, result: Any, experts: int) -> Node:
    """Put one node in the place of the loop, drop the rest; give the node, its target unset.

    The node's arguments are hidden, ids and weights; `result` is what the module returned.
    """
    graph = recorder.graph

    def given(value: Any) -> Any:
        if not isinstance(value, _HOLDERS):
            raise Unrecordable(f"it returns a {type(value).__name__}")
        return recorder.node_of(value)

    graph.output(tree_map(given, result))
    old = found.output
    with graph.inserting_after(old):
        anchor = graph.call_function(torch.empty, (0,))
    with graph.inserting_before(anchor):
        hidden = _rows(graph, found.hidden)
        node, total = _call(graph, hidden, found.routing, experts)
        new = _shaped(graph, total, found)
    old.replace_all_uses_with(new)
    _keep_only(graph, graph.output_node())
    graph.lint()
    return node


def write(graph: Graph) -> Callable[..., Any]:
    """Make the function `forward(self, *inputs)` of a graph."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<moecc.observe>", "exec"), names)
    function: Callable[..., Any] = names["forward"]
    return function


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A tensor of the module that the experts' call reads."""

    path: str
    shape: tuple[int, ...] | None = None
    """Its first elements seen so; a parameter may be flat, or go on with rows of no expert."""


def write_with(
    node: Node, call: Callable[..., torch.Tensor], weights: Sequence[Weight | None]
) -> Callable[..., Any]:
    """Let the experts' node call `call(hidden, ids, weights, *tensors)`; make the function."""
    graph = node.graph
    node.target = call
    with graph.inserting_before(node):
        tensors = [None if weight is None else _tensor(graph, weight) for weight in weights]
    node.args = (*node.args, *tensors)
    return write(graph)


def _tensor(graph: Graph, weight: Weight) -> Node:
    tensor = graph.get_attr(weight.path)
    if weight.shape is None:
        return tensor
    flat = graph.call_method("view", (tensor, -1))
    first = graph.call_function(operator.getitem, (flat, slice(None, math.prod(weight.shape))))
    return graph.call_method("view", (first, weight.shape))


def _unset(*_: object) -> torch.Tensor:
    raise NotImplementedError("the experts of a rewritten module have not been set")


def _rows(graph: Graph, node: Node) -> Node:
    """See [.., H] as [T, H]."""
    value = node.meta["example_value"]
    if value.dim() == 2:
        return node
    rows = graph.call_method("reshape", (node, -1, value.shape[-1]))
    rows.meta["example_value"] = value.reshape(-1, value.shape[-1])
    return rows


def _call(graph: Graph, hidden: Node, routing: Routing, experts: int) -> tuple[Node, Node]:
    """Write the experts' call; give its node, and the sum [T, H] made of what it gives."""
    value = hidden.meta["example_value"]
    if routing.gates is not None:
        ids, weights = _from_gates(graph, routing.gates, routing.scale, value.dtype)
        node = graph.call_function(_unset, (hidden, ids, weights))
        return node, node
    assert routing.ids is not None
    tokens = value.shape[0]
    ids = _slots(graph, routing.ids, tokens)
    if routing.weights is None:
        weights = graph.call_function(torch.ones_like, (ids,), {"dtype": value.dtype})
    else:
        weights = _slots(graph, routing.weights, tokens)
    if routing.weighs_input:
        return _weighed_rows(graph, hidden, ids, weights)
    node = graph.call_function(_unset, (hidden, ids, weights))
    if not routing.copies:
        return node, node
    return node, graph.call_function(_with_copies, (node, hidden, ids, experts, weights))


def _with_copies(
    total: torch.Tensor,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    experts: int,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Add each token itself as often as it chose an id beyond the last expert."""
    share = torch.where(ids >= experts, weights, 0).sum(dim=1, keepdim=True)
    return total + (hidden * share).to(total.dtype)


def _weighed_rows(graph: Graph, hidden: Node, ids: Node, weights: Node) -> tuple[Node, Node]:
    """Scale the tokens themselves: T*K of them, each with one choice of weight 1."""
    width = hidden.meta["example_value"].shape[1]
    columns = graph.call_method("unsqueeze", (weights, -1))
    rows = graph.call_function(torch.mul, (graph.call_method("unsqueeze", (hidden, 1)), columns))
    rows = graph.call_method("reshape", (rows, -1, width))
    rows = graph.call_method("to", (rows, hidden.meta["example_value"].dtype))
    one = graph.call_method("reshape", (ids, -1, 1))
    ones = graph.call_function(torch.ones_like, (one,), {"dtype": torch.float32})
    node = graph.call_function(_unset, (rows, one, ones))
    terms = graph.call_method("unflatten", (node, 0, graph.call_function(getattr, (ids, "shape"))))
    return node, graph.call_method("sum", (terms,), {"dim": 1})


def _slots(graph: Graph, node: Node, tokens: int) -> Node:
    """See [.., K], or [..] for one expert a token, as [T, K]; K may be another for other inputs."""
    shape = _shape(node)
    if node.meta["example_value"].numel() == tokens and shape[-1] != 1:
        return graph.call_method("reshape", (node, -1, 1))
    return node if len(shape) == 2 else graph.call_method("flatten", (node, 0, -2))


def _from_gates(
    graph: Graph, gates: Node, scale: Node | None, dtype: torch.dtype
) -> tuple[Node, Node]:
    """Give every expert's id where its gate is not zero, and -1, which adds nothing, elsewhere."""
    value = gates.meta["example_value"]
    experts = value.shape[-1]
    weights = graph.call_method("reshape", (gates, -1, experts))
    if not value.is_floating_point():
        weights = graph.call_method("to", (weights, dtype))
    if scale is not None:
        weights = graph.call_function(
            torch.mul, (weights, graph.call_method("reshape", (scale, -1, 1)))
        )
    every = graph.call_function(torch.arange, (experts,), {"device": value.device})
    wanted = graph.call_function(torch.ne, (weights, 0))
    return graph.call_function(torch.where, (wanted, every, -1)), weights


def _shaped(graph: Graph, node: Node, found: Explanation) -> Node:
    """Give the new sum the dtype and the shape of the old one."""
    value, hidden = (one.meta["example_value"] for one in (found.output, found.hidden))
    if value.dtype != hidden.dtype:
        node = graph.call_method("to", (node, value.dtype))
    if value.dim() == 2:
        return node
    like = next((one for one in _shape_givers(graph, found) if _shape(one) == value.shape), None)
    if like is None:
        raise Unrecordable(f"nothing else has the shape of its result, {tuple(value.shape)}")
    return graph.call_method("view_as", (node, like))


def _shape_givers(graph: Graph, found: Explanation) -> Iterable[Node]:
    yield found.hidden
    yield from graph.find_nodes(op="placeholder")


def _shape(node: Node) -> Sequence[int]:
    return node.meta["example_value"].shape


def _keep_only(graph: Graph, output: Node) -> None:
    """Erase what the output does not need.

    Not fx's own removal: in a recording every write is a value of its own, so what is not needed
    may go even if it writes.
    """
    needed, waiting = set[Node](), [output]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    for node in reversed(list(graph.nodes)):
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)

"""Compile an outlined graph: each callee once, what lies between them, and the calls as Python.

Every piece goes to the inner backend as a graph of its own. Its example inputs are fake tensors of
the sizes that Dynamo traced, symbols and all, so that what the backend learns of a symbol guards
the whole graph.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, groupby
from operator import getitem
from typing import Any, cast

import torch
from torch._guards import TracingContext
from torch.fx import Graph, GraphModule, Node

from moecc.passes.repeats.borders import computed
from moecc.passes.repeats.extract import extract, replace_by_call
from moecc.passes.repeats.windows import Facts, value_of, window
from moecc.passes.sizes import expression, known
from moecc.watching import Watch

_SELDOM = 0.03
"""The share of a call that `inner="auto"` leaves as it is: what a cut may cost at run time."""
_CALL = 2**14
"""Elements that are written in the time that a call of an operator takes, some microseconds."""
_EAGER = 3
"""What an operation that is left as it is costs beside one of a compiled layer: 61 of them took
0.83 ms more than compiled, in a call of 11.7 ms with 2,500 (`docs/decisions/0032`)."""


def compile_pieces(gm: GraphModule, watch: Watch) -> Callable[..., Any]:
    """Compile the callees of a graph and what lies between them, each as one piece."""
    graph = gm.graph
    facts = Facts.read(graph)
    rests = [window(nodes, facts) for nodes in _between(graph)]
    for number, rest in reversed([*enumerate(rests)]):
        name = f"between{number}"
        gm.add_submodule(name, extract(rest))
        replace_by_call(rest, partial(graph.call_module, name))
    compiled: dict[str, tuple[list[Any], Callable[..., Any]]] = {}
    calls = graph.find_nodes(op="call_module")
    ahead = {str(node.target): len(_piece(gm, node).graph.nodes) for node in calls}
    seldom = _seldom(gm, calls) if watch.auto else {}
    for node in calls:
        name, inputs = str(node.target), [value_of(cast(Node, one)) for one in node.args]
        if name not in compiled or not _guarded_alike(compiled[name][0], inputs):
            ahead.pop(name, None)
            examples = [*map(_example, inputs)]
            piece, left = _piece(gm, node), [*ahead.values()]
            run = watch.compile(piece, examples, name, left, seldom.get(name))
            compiled[name] = inputs, _named(run)
        node.op, node.target = "call_function", compiled[name][1]
    return GraphModule(gm, graph).forward


def _between(graph: Graph) -> list[list[Node]]:
    """Give the stretches of a graph that are not in a callee."""
    runs = groupby(computed(graph), _is_call)
    return [[*nodes] for is_call, nodes in runs if not is_call]


def _is_call(node: Node) -> bool:
    """Tell whether a node calls a callee or takes one of its outputs."""
    source = node.args[0] if node.target is getitem else node
    return isinstance(source, Node) and source.op == "call_module"


def _seldom(gm: GraphModule, calls: Sequence[Node]) -> dict[str, float]:
    """Give the pieces that together take `_SELDOM` of a call as they are, and the share of each.

    Products count as no more than what they write, which makes the shares too large.
    """
    times = Counter(str(node.target) for node in calls)
    pieces = {name: cast(GraphModule, gm.get_submodule(name)) for name in times}
    costs = {
        name: sum(map(_cost, computed(one.graph))) * times[name] for name, one in pieces.items()
    }
    shares = {name: _EAGER * cost / sum(costs.values()) for name, cost in costs.items()}
    cheapest = sorted(shares, key=lambda name: shares[name])
    sums = accumulate(shares[name] for name in cheapest)
    small = sum(one <= _SELDOM for one in sums)
    return {name: shares[name] for name in cheapest[:small]}


def _cost(node: Node) -> float:
    """Give what a node takes, in calls of an operator."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return 1
    size: Any = value.numel()
    elements: int | None = cast(Any, size).node.hint if isinstance(size, torch.SymInt) else size
    return 1 + (_CALL if elements is None else elements) / _CALL


def _piece(gm: GraphModule, call: Node) -> GraphModule:
    return cast(GraphModule, gm.get_submodule(str(call.target)))


def _named(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:  # what a graph calls has a name
        return compiled(*args)

    return run


def _guarded_alike(compiled: Sequence[Any], called: Sequence[Any]) -> bool:
    """Have the guards on the symbols of a piece's inputs hold for the symbols of another call.

    Each layer's cache may have a symbol of its own for its length. False if a guard does not hold.
    """
    sizes = [two for two in zip(compiled, called, strict=True) if isinstance(two[0], torch.SymInt)]
    stands = {expression(own): expression(given) for own, given in sizes}
    moved = {own for own, given in stands.items() if own != given}
    if not moved:
        return True
    shapes = sizes[0][0].node.shape_env
    guards = [guard.expr for guard in shapes.guards if guard.expr.free_symbols & moved]
    own = [guard for guard in guards if guard.free_symbols <= stands.keys()]
    return all(bool(shapes.evaluate_expr(guard.xreplace(stands))) for guard in own)


def _example(value: Any) -> Any:
    """Make a fake tensor like one that was traced, in the mode that the backend compiles in.

    Dynamo gives a backend another mode than it traced in, with the same symbols.
    """
    context = TracingContext.try_get()
    if not isinstance(value, torch.Tensor) or context is None or context.fake_mode is None:
        return value
    size, stride, offset = value.shape, value.stride(), value.storage_offset()
    with context.fake_mode:
        fresh = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
        if known(offset) == 0:
            return fresh
        extent = fresh.untyped_storage().nbytes() // fresh.itemsize + offset
        return fresh.new_empty(extent).as_strided(size, stride, offset)

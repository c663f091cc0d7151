"""Describe a stretch of a graph so that equal descriptions mean: one compiled callee serves both.

Parameters, handles and everything else from outside are inputs, told apart by where they are used.
Sizes are compared as expressions whose symbols are numbered as they appear: each layer's cache may
have a length of its own.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moecc.passes.pattern import mutates
from moecc.passes.sizes import expression, sympy

_PLAIN = (
    str, int, float, bool, complex, type(None), type(...),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What a compiler may specialise on in a value."""

    described: Hashable
    """Dtype, device and the like."""
    sizes: tuple[Any, ...]
    """Shape, strides and offset, or the value of a size: numbers and expressions."""
    memory: Hashable
    """The same for values that share memory."""
    crosses: bool
    """A callee can take it and give it back: a plain tensor or a size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a graph's values, read once."""

    of: Mapping[Node, Fact]
    sizes: Mapping[Any, Node]
    """The graph's inputs that its symbols stand for."""
    ranges: Mapping[Any, str]
    """What is known of a symbol without a guard."""

    @staticmethod
    def read(graph: Graph) -> "Facts":
        """Read every value of a graph."""
        inputs = [node for node in graph.find_nodes(op="placeholder") if _is_size(value_of(node))]
        sizes = {expression(value_of(node)): node for node in inputs}
        sizes = {symbol: node for symbol, node in sizes.items() if symbol.is_Symbol}
        known = {one: value_of(node).node.shape_env.var_to_range for one, node in sizes.items()}
        return Facts(
            of={node: _fact(node) for node in graph.nodes},
            sizes=sizes,
            ranges={symbol: str(ranges.get(symbol)) for symbol, ranges in known.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A stretch of a graph, and what enters and leaves it."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    """In the order of their first use; symbols that only shapes name come last."""
    outputs: tuple[Node, ...]
    """Those of `nodes` that the rest of the graph reads."""
    key: Hashable
    """Equal for stretches that one callee serves; None for what can have no callee."""
    entangled: bool
    """It writes to memory that several of its inputs share, which no compiler of it alone sees."""


def window(nodes: Sequence[Node], facts: Facts) -> Window:
    """Describe consecutive nodes of a graph."""
    inside = {node: number for number, node in enumerate(nodes)}
    entering: dict[Node, int] = {}
    calls = [_call(node, inside, entering) for node in nodes]
    outputs = tuple(node for node in nodes if any(user not in inside for user in node.users))
    seen = [facts.of[node] for node in (*nodes, *entering)]
    symbols: dict[Any, Any] = {}
    sizes = [tuple(_renamed(size, symbols) for size in fact.sizes) for fact in seen]
    named = {facts.of[node].sizes for node in entering if _is_size(value_of(node))}
    unnamed = [facts.sizes[one] for one in symbols if one in facts.sizes and (one,) not in named]
    memory = [facts.of[node].memory for node in entering]
    aliased = {one for one in memory if memory.count(one) > 1}
    alone = (
        not symbols.keys() <= facts.sizes.keys()
        or not all(facts.of[node].crosses for node in (*entering, *outputs))
        or any(node.op == "call_module" for node in nodes)
    )
    entangled = bool(aliased) and any(facts.of[one].memory in aliased for one in _written(nodes))
    key = (
        *calls,
        *(fact.described for fact in seen),
        *sizes,
        *(facts.ranges.get(one) for one in symbols),
        tuple(inside[node] for node in outputs),
        tuple(map(memory.index, memory)),
    )
    return Window(
        nodes=tuple(nodes),
        inputs=(*entering, *unnamed),
        outputs=outputs,
        key=None if alone or entangled else key,
        entangled=entangled,
    )


def _call(node: Node, inside: Mapping[Node, int], entering: dict[Node, int]) -> Hashable:
    """Name a call apart from where in the graph it is, and number what enters it from outside."""

    def name(value: Any) -> Hashable:
        match value:
            case Node() if value in inside:
                return "node", inside[value]
            case Node():
                return "input", entering.setdefault(value, len(entering))
            case list() | tuple():
                parts = cast("Sequence[Any]", value)
                return type(parts).__name__, tuple(map(name, parts))
            case dict():
                pairs = cast("dict[str, Any]", value).items()
                return "dict", tuple((key, name(one)) for key, one in pairs)
            case slice():
                limits = cast("slice[Any, Any, Any]", value)
                return "slice", tuple(map(name, (limits.start, limits.stop, limits.step)))
            case _:
                return type(value).__name__, repr(value) if isinstance(value, _PLAIN) else id(value)

    return node.op, node.target, name(node.args), name(node.kwargs)


def value_of(node: Node) -> Any:
    """Give what Dynamo traced for a node: a fake tensor, a size, a tuple of them."""
    return node.meta.get("example_value")


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.SymInt)


def _renamed(size: Any, symbols: dict[Any, Any]) -> Hashable:
    """Write a size with its symbols numbered in the order in which they are met."""
    if isinstance(size, int):
        return size
    for one in sorted(size.free_symbols, key=str):
        symbols.setdefault(one, sympy.Symbol(f"size{len(symbols)}"))
    return str(size.xreplace(symbols))


def _fact(node: Node) -> Fact:
    value = value_of(node)
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return Fact(
        described=_described(value),
        sizes=tuple(_sizes(value)),
        memory=value.untyped_storage()._cdata if plain else node,  # pyright: ignore[reportPrivateUsage]
        crosses=_is_size(value) or (plain and not is_traceable_wrapper_subclass(value)),
    )


def _described(value: Any) -> Hashable:
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, cast("Sequence[Any]", value)))
    if not isinstance(value, torch.Tensor):
        return type(value).__name__, "" if _is_size(value) else str(value)
    return value.dtype, str(value.device), value.requires_grad, str(value.layout), value.dim()


def _sizes(value: Any) -> Iterator[Any]:
    """List what sizes a value has; a symbol is an expression, anything else a number."""
    if isinstance(value, (tuple, list)):
        for part in cast("Sequence[Any]", value):
            yield from _sizes(part)
    elif isinstance(value, torch.Tensor):
        strided = value.layout == torch.strided
        strides = (*value.stride(), value.storage_offset()) if strided else ()
        yield from (expression(one) if _is_size(one) else one for one in (*value.shape, *strides))
    elif _is_size(value):
        yield expression(value)


def _written(nodes: Sequence[Node]) -> Iterator[Node]:
    """List the values that a stretch writes to in place."""
    for node in filter(mutates, nodes):
        schema = getattr(node.target, "_schema", None)
        infos = [one.alias_info for one in schema.arguments] if schema is not None else []
        places = [at for at, info in enumerate(infos) if info and info.is_write] or [0]
        given = [node.args[at] for at in places if at < len(node.args)]
        yield from (one for one in (*given, node.kwargs.get("out")) if isinstance(one, Node))

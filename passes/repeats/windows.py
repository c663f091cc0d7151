"""Describe a stretch of a graph so that equal descriptions mean: one compiled callee serves both.

Parameters, handles and everything else from outside are inputs, told apart by where they are used.
Sizes are compared as expressions whose symbols are numbered as they appear: each layer's cache may
have a length of its own.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
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
    """What a node is apart from its place in the graph; equal numbers mean equal descriptions."""

    call: int
    """The target and its arguments, the nodes among them numbered in the order of `reads`."""
    reads: tuple[Node, ...]
    value: int
    """What a compiler may specialise on: dtype, device, shape, strides, the symbols renamed."""
    symbols: tuple[Any, ...]
    """Those of the value's sizes, in the order in which they are met."""
    memory: Hashable
    """The same for values that share memory."""
    writes: tuple[Node, ...]
    """What the call writes to in place."""
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
    numbers: dict[Hashable, int]
    """What each description has as its number, from 1: numbers are compared faster."""

    @staticmethod
    def read(graph: Graph) -> "Facts":
        """Read every value of a graph."""
        inputs = [node for node in graph.find_nodes(op="placeholder") if _is_size(value_of(node))]
        sizes = {expression(value_of(node)): node for node in inputs}
        sizes = {symbol: node for symbol, node in sizes.items() if symbol.is_Symbol}
        known = {one: value_of(node).node.shape_env.var_to_range for one, node in sizes.items()}
        numbers: dict[Hashable, int] = {}
        renamed: dict[Any, tuple[str, tuple[Any, ...]]] = {}
        return Facts(
            of={node: _fact(node, numbers, renamed) for node in graph.nodes},
            sizes=sizes,
            ranges={symbol: str(ranges.get(symbol)) for symbol, ranges in known.items()},
            numbers=numbers,
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
    own = [facts.of[node] for node in nodes]
    read = dict.fromkeys(one for fact in own for one in fact.reads if one not in inside)
    entering = {node: ~number for number, node in enumerate(read)}  # below 0: no place inside
    places = inside | entering
    outputs = tuple(node for node in nodes if any(user not in inside for user in node.users))
    seen = (*own, *(facts.of[node] for node in entering))
    symbols: dict[Any, int] = {}
    sizes = [_places(fact.symbols, symbols) for fact in seen]
    named = {expression(value_of(node)) for node in entering if _is_size(value_of(node))}
    unnamed = [facts.sizes[one] for one in symbols if one in facts.sizes and one not in named]
    memory = Counter(facts.of[node].memory for node in entering)
    alone = (
        not symbols.keys() <= facts.sizes.keys()
        or not all(facts.of[node].crosses for node in (*entering, *outputs))
        or any(node.op == "call_module" for node in nodes)
    )
    entangled = any(memory[facts.of[one].memory] > 1 for fact in own for one in fact.writes)
    key = (
        *((fact.call, *map(places.__getitem__, fact.reads)) for fact in own),
        *(fact.value for fact in seen),
        *sizes,
        *(facts.ranges.get(one) for one in symbols),
        tuple(inside[node] for node in outputs),
        _places([facts.of[node].memory for node in entering], {}),
    )
    return Window(
        nodes=tuple(nodes),
        inputs=(*entering, *unnamed),
        outputs=outputs,
        key=None if alone or entangled else _number(key, facts.numbers),
        entangled=entangled,
    )


def _places(values: Iterable[Hashable], met: dict[Any, int]) -> tuple[int, ...]:
    """Give each value its place among the different ones, in the order in which they are met."""
    return tuple(met.setdefault(one, len(met)) for one in values)


def _number(described: Hashable, numbers: dict[Hashable, int]) -> int:
    return numbers.setdefault(described, len(numbers) + 1)


def _call(node: Node, reads: dict[Node, int]) -> Hashable:
    """Name a call apart from where in the graph it is, and number the nodes that it reads."""

    def name(value: Any) -> Hashable:
        match value:
            case Node():
                return Node, reads.setdefault(value, len(reads))
            case list() | tuple():
                parts = cast("Sequence[Any]", value)
                return type(parts), tuple(map(name, parts))
            case dict():
                pairs = cast("dict[str, Any]", value).items()
                return dict, tuple((key, name(one)) for key, one in pairs)
            case slice():
                limits = cast("slice[Any, Any, Any]", value)
                return slice, tuple(map(name, (limits.start, limits.stop, limits.step)))
            case _:
                return type(value).__name__, repr(value) if isinstance(value, _PLAIN) else id(value)

    return node.op, node.target, name(node.args), name(node.kwargs)


def value_of(node: Node) -> Any:
    """Give what Dynamo traced for a node: a fake tensor, a size, a tuple of them."""
    return node.meta.get("example_value")


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.SymInt)


def _fact(
    node: Node, numbers: dict[Hashable, int], renamed: dict[Any, tuple[str, tuple[Any, ...]]]
) -> Fact:
    value, reads = value_of(node), dict[Node, int]()
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
    sizes = [
        (size, ()) if isinstance(size, int) else _renamed(size, renamed) for size in _sizes(value)
    ]
    described = _described(value), tuple(text for text, _ in sizes)
    return Fact(
        call=_number(_call(node, reads), numbers),
        reads=tuple(reads),
        value=_number(described, numbers),
        symbols=tuple(one for _, symbols in sizes for one in symbols),
        memory=value.untyped_storage()._cdata if plain else node,  # pyright: ignore[reportPrivateUsage]
        writes=tuple(_written(node)) if mutates(node) else (),
        crosses=_is_size(value) or (plain and not is_traceable_wrapper_subclass(value)),
    )


def _renamed(
    size: Any, renamed: dict[Any, tuple[str, tuple[Any, ...]]]
) -> tuple[str, tuple[Any, ...]]:
    """Write a size with its symbols numbered, and list them; sympy is slow, so each size once."""
    if size not in renamed:
        symbols = tuple(sorted(size.free_symbols, key=str))
        numbered = {one: sympy.Symbol(f"size{at}") for at, one in enumerate(symbols)}
        renamed[size] = str(size.xreplace(numbered)), symbols
    return renamed[size]


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


def _written(node: Node) -> Iterator[Node]:
    """List the values that a call writes to in place."""
    schema = getattr(node.target, "_schema", None)
    infos = [one.alias_info for one in schema.arguments] if schema is not None else []
    places = [at for at, info in enumerate(infos) if info and info.is_write] or [0]
    given = [node.args[at] for at in places if at < len(node.args)]
    yield from (one for one in (*given, node.kwargs.get("out")) if isinstance(one, Node))

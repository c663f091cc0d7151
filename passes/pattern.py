"""Describe a structure in a graph and find out whether, and how far, it is there.

A pattern is written from the result back to the inputs, like the expression it recognises:

    call("mul", bind("a"), call("sigmoid", bind("a")))      a * sigmoid(a)

Functions and methods are named alike (`torch.sum(x)` and `x.sum()` are both "sum"); several names
are separated by `|`. A name bound twice must stand for the same node. A match that fails keeps the
farthest point it reached, which is what the report shows as a near miss.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Target

_COMMUTATIVE = {"add", "mul"}
_CASTS = {"to", "float", "half", "bfloat16", "type", "type_as", "contiguous"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FREE = {
    "arange": {"device", "dtype"},
    "argsort": {"dim", "stable"},
    "cumsum": {"dim", "dtype"},
    "histc": {"bins", "min", "max"},
    "sort": {"dim", "stable"},
    "sum": {"dtype"},
    "grouped_mm": {"offs", "bias", "out_dtype"},
    "_grouped_mm": {"offs", "bias", "out_dtype"},
    "empty_like": {"device", "dtype"},
}
"""Keywords that do not change what a call is; any other that a pattern does not name does."""
_POSITIONAL = {
    "arange": ("end", "step"),
    "argsort": ("dim", "descending", "stable"),
    "bincount": ("weights", "minlength"),
    "cumsum": ("dim",),
    "div": ("other",),
    "histc": ("bins", "min", "max"),
    "sort": ("dim", "descending", "stable"),
    "sum": ("dim", "keepdim"),
}
"""What the arguments after the first are called, where a model may give them either way."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of one of `names` whose arguments match.

    Keywords that the pattern does not name are refused, unless None, False or in `_FREE`, and so
    are positional arguments with a name in `_POSITIONAL`. Others are sizes and ignored (`view`).
    """

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Bind:
    """Anything, or what `pattern` matches, remembered under a name."""

    name: str
    pattern: Any = None


@dataclass(frozen=True, slots=True)
class Cast:
    """What `pattern` matches, or a change of its dtype or layout."""

    pattern: Any


@dataclass(frozen=True, slots=True)
class Either:
    """The first of several patterns that matches."""

    patterns: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Mutated:
    """What `pattern` matches, after the in-place call `by`, whose first argument it is."""

    pattern: Any
    by: Call


def call(names: str, *args: Any, **kwargs: Any) -> Call:
    """Match a call; `call("view|reshape", x)` takes either name and ignores further sizes."""
    return Call(tuple(names.split("|")), args, tuple(kwargs.items()))


def bind(name: str, pattern: Any = None) -> Bind:
    """Match anything, or `pattern`, and remember it."""
    return Bind(name, pattern)


def cast(pattern: Any) -> Cast:
    """Match `pattern` through any changes of dtype."""
    return Cast(pattern)


def either(*patterns: Any) -> Either:
    """Match the first of several that fits."""
    return Either(patterns)


ANY = bind("")
"""Match anything and forget it."""


@dataclass(slots=True)
class Match:
    """The state of one attempt."""

    bindings: dict[str, Any] = field(default_factory=dict[str, Any])
    nodes: list[Node] = field(default_factory=list[Node])
    """Every node that a `Call` matched."""
    reached: int = 0
    stopped_at: Node | None = None
    reason: str = ""

    def find(self, pattern: Any, value: Any) -> bool:
        """Match `pattern` against a node or a constant; on failure the bindings are as before."""
        return self._or_restore(lambda: self._find(pattern, value))

    def _or_restore(self, attempt: Callable[[], bool]) -> bool:
        bindings, count = dict(self.bindings), len(self.nodes)
        if attempt():
            return True
        self.bindings = bindings
        del self.nodes[count:]
        return False

    def fail(self, node: Any, reason: str) -> bool:
        """Note why an attempt stopped, if it came farther than the ones before; return False."""
        if self.stopped_at is None or len(self.nodes) >= self.reached:
            self.reached = len(self.nodes)
            self.reason = reason
            if isinstance(node, Node):
                self.stopped_at = node
        return False

    def _find(self, pattern: Any, value: Any) -> bool:
        match pattern:
            case Bind(name, inner):
                if inner is not None and not self.find(inner, value):
                    return False
                bound = self.bindings.setdefault(name, value) if name else value
                same = bound is value or (not isinstance(value, Node) and bound == value)
                return same or self.fail(value, f"expected {name} to be {bound}, found {value}")
            case Cast(inner):
                if isinstance(value, Node) and is_cast(value):
                    self.nodes.append(value)
                    return self.find(pattern, value.args[0])
                return self.find(inner, value)
            case Either(patterns):
                return any(self.find(one, value) for one in patterns)
            case Mutated(inner, by):
                return self._find_mutated(inner, by, value)
            case Call():
                return self._find_call(pattern, value)
            case _:
                return pattern == value or self.fail(value, f"expected {pattern}, found {value}")

    def _find_mutated(self, pattern: Any, by: Call, value: Any) -> bool:
        if not isinstance(value, Node):
            return self.fail(value, f"expected a tensor changed by {by.names[0]}, found {value}")
        for user in value.users:
            if op_name(user) in by.names and user.args[0] is value and self._find_call(by, user):
                return self.find(pattern, value)
        return self.fail(value, f"expected {value} to be changed by {by.names[0]}")

    def _find_call(self, pattern: Call, value: Any) -> bool:
        expected = " or ".join(pattern.names)
        if not isinstance(value, Node) or op_name(value) not in pattern.names:
            found = op_name(value) if isinstance(value, Node) else value
            return self.fail(value, f"expected {expected}, found {found}")
        if len(value.args) < len(pattern.args):
            return self.fail(value, f"{expected} has only {len(value.args)} positional arguments")
        named = {key for key, _ in pattern.kwargs} | _FREE.get(op_name(value), set())
        given = _keywords(value, len(pattern.args))
        extra = {key for key, one in given.items() if one is not None and one is not False} - named
        if extra:
            return self.fail(value, f"{expected} is called with {', '.join(sorted(extra))}")
        self.nodes.append(value)
        kwargs = all(self.find(inner, given.get(key)) for key, inner in pattern.kwargs)
        return kwargs and any(
            self._or_restore(functools.partial(self._find_args, pattern, args))
            for args in _orders(pattern, value)
        )

    def _find_args(self, pattern: Call, args: tuple[Any, ...]) -> bool:
        return all(self.find(inner, arg) for inner, arg in zip(pattern.args, args, strict=False))


def _keywords(node: Node, taken: int) -> dict[str, Any]:
    """Name the arguments of a call beyond the first `taken`, however the model gave them."""
    names = _POSITIONAL.get(op_name(node), ())[max(taken, 1) - 1 :]
    return dict(zip(names, node.args[max(taken, 1) :], strict=False)) | dict(node.kwargs)


def _orders(pattern: Call, node: Node) -> Iterator[tuple[Any, ...]]:
    yield node.args
    if len(node.args) == 2 and _COMMUTATIVE.intersection(pattern.names):
        yield node.args[::-1]


def op_name(node: Node) -> str:
    """Name what a node does, functions, methods and operators alike: `mul`, `view`, `topk`.

    Placeholders, attributes and outputs are named by their kind.
    """
    return target_name(node.target) if node.op.startswith("call_") else node.op


def target_name(target: Target) -> str:
    """Name a call's target without its namespace or overload."""
    if isinstance(target, str):
        return target
    packet = getattr(target, "overloadpacket", target)
    qualified = getattr(packet, "_qualified_op_name", None)
    if qualified is not None:
        return str(qualified).rpartition("::")[2]
    return str(getattr(target, "__name__", target))


def is_cast(node: Node) -> bool:
    """Tell whether a node only changes a tensor's floating-point dtype or layout."""
    if op_name(node) not in _CASTS:
        return False
    value = node.meta.get("example_value")
    return value is None or value.dtype in FLOATS


_IN_PLACE_OPERATORS = {"setitem", "delitem"} | {
    f"i{name}"
    for name in (
        "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
        "lshift", "rshift",
    )
}  # fmt: skip


def mutates(node: Node) -> bool:
    """Tell whether a node writes to one of its arguments (Dynamo graphs are not functional)."""
    if not node.op.startswith("call_"):
        return False
    name = op_name(node)
    in_place = name.endswith("_") and not name.endswith("__")
    asked = bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
    schema = getattr(node.target, "_schema", None)
    declared = schema is not None and bool(schema.is_mutable)
    return in_place or asked or declared or name in _IN_PLACE_OPERATORS

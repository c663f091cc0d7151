"""Read experts that are called one by one, each on its own buffer, as one on all buffers.

    parts = [down(act(up(slots[e]))) for e, (up, down) in enumerate(experts)]
    torch.stack(parts)
→
    rows = einsum("e...i,eoi->e...o", slots, stack(every up))
    einsum("e...i,eoi->e...o", act(rows), stack(every down))

What the calls have in common is written once over a first dimension of E, beside them, their
parameters stacked, so that it is read like any other dispatched block. Nothing else in the graph
reads what is written here; what does not become part of a block is erased again (`detect_moe`).
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from moecc.codegen.activation import OPERATIONS
from moecc.passes.axes import View, over_own_axes, shape_of, tensor_of, through_layout
from moecc.passes.build import Builder
from moecc.passes.found import NearMiss
from moecc.passes.parameters import GIVEN, stacked_parameters
from moecc.passes.pattern import mutates, op_name
from moecc.passes.sizes import same, same_shape

_JOINS = {"stack", "cat", "concat", "concatenate"}
_ROWWISE = {
    *OPERATIONS, "bfloat16", "clamp", "clamp_max", "clamp_min", "clip", "clone", "contiguous",
    "detach", "float", "half", "maximum", "minimum", "multiply", "pow", "subtract",
    "swish", "to", "truediv", "type",
}  # fmt: skip
"""What treats every number, or every number and those of a vector, alike."""
_SPLITS = {"chunk", "split", "tensor_split"}
_PRODUCTS = {"linear", "matmul", "mm", "addmm"}
_ONE_BY_ONE = "its experts are called one by one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """E calls of experts as one."""

    terms: View
    """What the calls give, put together as the model does it."""
    nodes: tuple[Node, ...]
    """The calls, what stands for them, and what lies between them and where they were read."""


def is_apart(terms: View) -> bool:
    """Tell whether a value is several put together."""
    return op_name(_join_of(terms)[0].node) in _JOINS


def read_together(terms: View, output: Node) -> Together:
    """Write the calls that `terms` are put together from as one, before the node `output`.

    Raises `NearMiss` where they are not alike.
    """
    join, between = _join_of(terms)
    parts = cast(Sequence[Any], join.node.args[0])
    if len(parts) < 2 or not all(isinstance(part, Node) for part in parts):
        raise NearMiss(output, f"{_ONE_BY_ONE}, and their results are put together with others")
    writer = _Writer(Builder(output.graph, output), len(parts))
    try:
        every = writer.together(tuple(parts))
        whole = _put_together(writer, join.node, every, len(shape_of(parts[0])))
    except RuntimeError as error:  # whatever torch says to a shape that was not thought of
        raise NearMiss(output, f"{_ONE_BY_ONE}, and not at once: {error}") from error
    nodes = (*between, join.node, *writer.replaced, *writer.written)
    return Together(terms=join.of(whole, join.dims), nodes=nodes)


def _join_of(view: View) -> tuple[View, list[Node]]:
    """Go back through what only changes layout or dtype; give the nodes on the way, too."""
    between: list[Node] = []
    while (below := through_layout(view)) is not None:
        between.append(view.node)
        view = below
    return view, between


def _put_together(writer: "_Writer", join: Node, every: Node, rank: int) -> Node:
    """Lay [E, ..] out as `stack` or `cat` lays the parts out, each of `rank` dimensions."""
    dim = cast(int, join.kwargs.get("dim", (*join.args, 0)[1]))
    stacks = op_name(join) == "stack"
    dim %= rank + 1 if stacks else rank
    order = [*range(1, dim + 1), 0, *range(dim + 1, rank + 1)]
    laid = writer.method("permute", every, order)
    return laid if stacks else writer.method("flatten", laid, dim, dim + 1)


class _Writer:
    """Writes values that E calls have in common over a first dimension of E."""

    def __init__(self, build: Builder, experts: int) -> None:
        self.replaced: dict[Node, None] = {}
        self.written: list[Node] = []
        self._build = build
        self._experts = experts
        self._known: dict[tuple[Any, ...], Node] = {}

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        """Write a call of a method."""
        self.written.append(self._build.method(name, *args, **kwargs))
        return self.written[-1]

    def function(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Write a call of a function."""
        self.written.append(self._build.function(target, *args, **kwargs))
        return self.written[-1]

    def together(self, values: tuple[Node, ...]) -> Node:
        """Give one value [E, ..] for one of each expert."""
        if values not in self._known:
            found = self._slices(values) or self._parameters(values) or self._calls(values)
            self._known[values] = found
        return self._known[values]

    def _slices(self, values: tuple[Node, ...]) -> Node | None:
        """Recognise what is one expert's part of a tensor each, in their order."""
        slices = [_slice_of(value) for value in values]
        if slices[0] is None or any(one is None for one in slices):
            return None
        whole, dim, _, drops = slices[0]
        for number, one in enumerate(slices):
            if one is None or (one[0], one[1], one[3]) != (whole, dim, drops) or one[2] != number:
                return None
        shape = shape_of(values[0])
        size = 1 if drops else shape[dim]
        alike = all(same_shape(shape_of(value), shape) for value in values)
        if not alike or not same(shape_of(whole)[dim], size * self._experts):
            return None
        self._replace(values)
        self._replace([one for one in map(_tuple_of, values) if one is not None])
        if not drops:
            whole = self.method("unflatten", whole, dim, (self._experts, -1))
        rest = [other for other in range(len(shape_of(whole))) if other != dim]
        return self.method("permute", whole, [dim, *rest])

    def _parameters(self, values: tuple[Node, ...]) -> Node | None:
        """Stack parameters, one of each expert."""
        first = values[0]
        if any(value.op not in GIVEN for value in values):
            return None
        if len(set(values)) < self._experts:
            raise NearMiss(first, f"{_ONE_BY_ONE}, and share {first.name}")
        tensors = [cast(torch.Tensor, tensor_of(value)) for value in values]
        if any(type(one) is not FakeTensor for one in tensors):
            raise NearMiss(
                first, f"{_ONE_BY_ONE}, and {first.name} is a {type(tensors[0]).__name__}"
            )
        if len({(one.shape, one.dtype, one.device) for one in tensors}) > 1:
            raise NearMiss(first, f"{_ONE_BY_ONE}, and have parameters of several shapes")
        stack = self.function(torch.stack, list(values))
        if not stacked_parameters(stack):
            raise NearMiss(first, f"{_ONE_BY_ONE}, and {first.name} is no contiguous parameter")
        return stack

    def _calls(self, values: tuple[Node, ...]) -> Node:
        """Write a call once that all experts make."""
        first, name = values[0], op_name(values[0])
        calls = {(one.target, len(one.args), tuple(one.kwargs)) for one in values}
        if len(calls) > 1 or len(set(values)) < self._experts:
            raise NearMiss(first, f"{_ONE_BY_ONE}, and do not all compute the same")
        if mutates(first) or not first.op.startswith("call_"):
            raise NearMiss(first, f"{_ONE_BY_ONE}, and {name} writes in place")
        self._replace(values)
        if name in _PRODUCTS:
            return self._product(values)
        if name == "dropout" and all(map(_keeps_all, values)):  # its share may be an input, too
            return self.together(tuple(cast(Node, one.args[0]) for one in values))
        args = [self._argument(given) for given in zip(*(one.args for one in values), strict=True)]
        kwargs = {key: self._argument([one.kwargs[key] for one in values]) for key in first.kwargs}
        if name == "getitem":
            args[1] = _index_of_rows(first)
        elif name in _SPLITS and _along_last(first):
            args, kwargs = args[:2], {"dim": -1}
        elif name in _ROWWISE and not any(isinstance(one, Node) for one in kwargs.values()):
            rank = len(shape_of(first))
            args = [
                self._over_rows(new, old, rank) for new, old in zip(args, first.args, strict=True)
            ]
        else:
            raise NearMiss(first, f"{_ONE_BY_ONE}, and call {name}")
        if first.op == "call_method":
            return self.method(cast(str, first.target), *args, **kwargs)
        return self.function(cast(Callable[..., Any], first.target), *args, **kwargs)

    def _argument(self, given: Sequence[Any]) -> Any:
        """Give an argument that all calls have alike, or what stands for those of all calls."""
        if any(isinstance(one, Node) for one in given):
            if not all(isinstance(one, Node) for one in given):
                raise NearMiss(given[0], f"{_ONE_BY_ONE}, and do not all compute the same")
            return self.together(tuple(given))
        if any(type(one) is not type(given[0]) or one != given[0] for one in given):
            why = f"{_ONE_BY_ONE}, and compute with other numbers: {given[0]} and {given[-1]}"
            raise NearMiss(next(reversed(self.replaced)), why)
        return given[0]

    def _product(self, values: tuple[Node, ...]) -> Node:
        """Write products of rows with a parameter of each expert as one."""
        first, name = values[0], op_name(values[0])
        names = {"linear": ("x", "w", "b"), "addmm": ("b", "x", "w")}.get(name, ("x", "w"))
        bound: list[dict[str, Any]] = [
            dict(zip(names, one.args, strict=False))
            | {
                {"input": "x", "weight": "w", "bias": "b"}.get(k, k): v
                for k, v in one.kwargs.items()
            }
            for one in values
        ]
        if set(bound[0]) - {"x", "w", "b"} or len(shape_of(bound[0]["w"])) != 2:
            raise NearMiss(first, f"{_ONE_BY_ONE}, and call {name} in a way that is not read")
        matrices = tuple(one["w"] for one in bound)
        w = self._slices(matrices) or self._parameters(matrices)
        if w is None:
            raise NearMiss(first, f"{_ONE_BY_ONE}, and compute what they multiply by")
        x = self.together(tuple(one["x"] for one in bound))
        order = "eoi" if name == "linear" else "eio"
        rows = self.function(torch.einsum, f"e...i,{order}->e...o", x, w)
        bias = [one.get("b") for one in bound]
        if all(one is None for one in bias):
            return rows
        added = self._over_rows(self._argument(bias), bias[0], len(shape_of(first)))
        return self.function(operator.add, rows, added)

    def _over_rows(self, every: Any, one: Any, rank: int) -> Any:
        """See [E, ..] so that it spreads over [E, ..] of more dimensions, as one of them does."""
        value = tensor_of(one)
        if value is None or value.dim() >= rank:
            return every
        ones = [1] * (rank - value.dim())
        return self.method("reshape", every, self._experts, *ones, *value.shape)

    def _replace(self, values: Sequence[Node]) -> None:
        self.replaced |= dict.fromkeys(values)


def _slice_of(node: Node) -> tuple[Node, int, int, bool] | None:
    """Read one part of a tensor: whose, along which dimension, which one, and if that drops it."""
    name, args = op_name(node), cast(tuple[Any, ...], node.args)
    if name == "select" and len(args) == 3 and tensor_of(args[0]) is not None:
        return args[0], args[1] % len(shape_of(args[0])), args[2], True
    if name != "getitem" or not isinstance(args[0], Node):
        return None
    source, index = args[:2]
    if tensor_of(source) is not None:
        parts = cast(tuple[Any, ...], index if isinstance(index, tuple) else (index,))
        chosen = [place for place, part in enumerate(parts) if type(part) is int]
        plain = all(type(part) is int or part == slice(None) for part in parts)
        return (source, chosen[0], parts[chosen[0]], True) if plain and len(chosen) == 1 else None
    if op_name(source) not in ("unbind", *_SPLITS) or tensor_of(source.args[0]) is None:
        return None
    place = 1 if op_name(source) == "unbind" else 2
    dim = source.kwargs.get("dim", source.args[place] if len(source.args) > place else 0)
    whole = cast(Node, source.args[0])
    return whole, cast(int, dim) % len(shape_of(whole)), index, op_name(source) == "unbind"


def _tuple_of(part: Node) -> Node | None:
    """Give the call that gave a value as one of several."""
    source = part.args[0] if part.args else None
    return source if isinstance(source, Node) and tensor_of(source) is None else None


def _keeps_all(dropout: Node) -> bool:
    """Tell whether a dropout is one of inference."""
    return through_layout(over_own_axes(dropout)) is not None


def _along_last(split: Node) -> bool:
    """Tell whether a split is one of the last dimension."""
    dim = split.kwargs.get("dim", split.args[2] if len(split.args) > 2 else 0)
    source = cast(tuple[Any, ...], split.args)[0]
    return dim in (-1, len(shape_of(source)) - 1)


def _index_of_rows(node: Node) -> Any:
    """Give an index for one more dimension in front: into results of a split, or `[.., a:b]`."""
    source, index = cast(tuple[Node, Any], node.args)
    if tensor_of(source) is None:
        return index
    parts = cast(Sequence[Any], index if isinstance(index, tuple) else (index,))
    if any(part is not Ellipsis and not isinstance(part, slice) for part in parts):
        raise NearMiss(node, f"{_ONE_BY_ONE}, and index in a way that is not read")
    return tuple(parts) if parts[0] is Ellipsis else (slice(None), *parts)

"""Follow axes backwards through a graph: which index of each input an index of a result reads.

A node is seen over `dims`: for each of its dimensions, the axes that run along it. A dimension made
by merging two carries both, row-major; one that is only there to be broadcast carries none. Going
back through views, permutations, casts and products keeps the axes, so that two tensors that share
an axis are known to be indexed alike, however the model spells it. Sizes are compared as the
expressions that Dynamo traced, without a guard.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Node

from moecc.passes.pattern import op_name
from moecc.passes.sizes import expression, same, sympy

_CASTS = {
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long",
    "contiguous", "clone", "detach", "dropout",
}  # fmt: skip
_RESHAPES = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
}  # fmt: skip
_SWAPS = {"transpose", "swapaxes", "swapdims"}


Extent = Any
"""A size: an expression over the graph's symbols, which sympy does not type."""


@dataclass(eq=False, slots=True)
class Axis:
    """A range of indices; two axes are the same only if they are the same object."""

    size: Extent
    parts: tuple["Axis", ...] = ()
    """What it was split into, slowest first, once a view has shown that it consists of several."""
    at: int | None = None
    """The only one of its indices that is looked at."""


Dim = tuple[Axis, ...]
Dims = tuple[Dim, ...]
Bound = dict[tuple[Any, ...], Axis]
"""The axes that sums run over, so that reading a node again gives the same ones."""


@dataclass(frozen=True, slots=True)
class View:
    """A node and the axes along each of its dimensions."""

    node: Node
    dims: Dims
    negated: bool = False
    """Stands for `not node`."""

    @property
    def axes(self) -> frozenset[Axis]:
        """Every axis of more than one index."""
        return frozenset(axis for dim in self.dims for axis in leaves(dim))

    @property
    def key(self) -> tuple[Any, ...]:
        """What two views of the same values have in common."""
        return (self.node, self.negated, tuple(map(leaves, self.dims)))

    def renamed(self, old: Dim, new: Dim) -> "View":
        """Put other axes in the place of some, one for one."""
        names = dict(zip(old, new, strict=True))
        dims = tuple(tuple(names.get(axis, axis) for axis in leaves(dim)) for dim in self.dims)
        return replace(self, dims=dims)

    def of(self, node: Node, dims: Dims) -> "View":
        """Go on to a node that holds the same values."""
        return replace(self, node=node, dims=dims)


def leaves(axes: Iterable[Axis]) -> Dim:
    """Resolve axes into the ones that they were split into, without those of a single index."""
    found: list[Axis] = []
    for axis in axes:
        if axis.parts:
            found += leaves(axis.parts)
        elif axis.size != 1:
            found.append(axis)
    return tuple(found)


def tensor_of(node: Any) -> torch.Tensor | None:
    """Give the tensor that a node was traced with, if it is one."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: Node) -> tuple[Extent, ...]:
    """Give a node's sizes; those of what is not a tensor are none."""
    value = tensor_of(node)
    return tuple(map(expression, value.shape)) if value is not None else ()


def size_along(axes: Iterable[Axis]) -> Extent:
    """Multiply the axes' sizes."""
    return sympy.Mul(*(axis.size for axis in axes))


def over_own_axes(node: Node) -> View:
    """See a node over axes of its own, one for each dimension."""
    return View(node, tuple((Axis(size),) for size in shape_of(node)))


def broadcast(operand: Any, dims: Dims) -> View | None:
    """See an operand of something elementwise over the result's dims."""
    if tensor_of(operand) is None:
        return None
    shape = shape_of(operand)
    pairs = zip(shape, dims[len(dims) - len(shape) :], strict=True)
    return View(operand, tuple(_unless_spread(size, dim) for size, dim in pairs))


def _unless_spread(size: Extent, dim: Dim) -> Dim:
    """Give a dimension's axes, none if it is broadcast along them."""
    return () if size == 1 and not same(size_along(dim), 1) else dim


def through_layout(view: View) -> View | None:
    """Go back one step, if the node only changes layout or dtype and no value."""
    node, name = view.node, op_name(view.node)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or tensor_of(source) is None or tensor_of(node) is None:
        return None
    if name in _CASTS:
        return view.of(source, view.dims) if _keeps_values(source, node) else None
    if name in _RESHAPES or (name == "getitem" and _only_adds_dims(node)):
        return _through_reshape(source, view)
    if name in ("expand", "expand_as", "broadcast_to"):
        spread = broadcast(source, view.dims)
        return spread and view.of(source, spread.dims)
    order = _permutation(node, len(shape_of(source)))
    if order is None:
        return None
    back = {old: view.dims[new] for new, old in enumerate(order)}
    return view.of(source, tuple(back[index] for index in range(len(order))))


def _keeps_values(source: Node, node: Node) -> bool:
    """Tell whether a cast is harmless: floats stay floats, and what was whole stays whole.

    A count may be too large for the smaller dtypes: who reads counts has to look at theirs.
    """
    before, after = cast(torch.Tensor, tensor_of(source)), cast(torch.Tensor, tensor_of(node))
    if op_name(node) == "dropout":
        return node.kwargs.get("training", (*node.args, True, True)[2]) is False
    if before.device != after.device:
        return False
    wholes = (torch.int32, torch.int64) if not before.is_floating_point() else ()
    return after.dtype is before.dtype or after.is_floating_point() or after.dtype in wholes


def _only_adds_dims(node: Node) -> bool:
    """Recognise `x[:, None]`, `x[..., None]` and the like, which select nothing."""
    index = node.args[1]
    parts = cast(tuple[Any, ...], index if isinstance(index, tuple) else (index,))
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def _permutation(node: Node, count: int) -> tuple[int, ...] | None:
    """Say which dimension of its input each dimension of a permutation is."""
    name, args, order = op_name(node), cast(tuple[Any, ...], node.args[1:]), list(range(count))
    if name == "permute":
        dims = args[0] if len(args) == 1 else args or node.kwargs.get("dims")
        return tuple(int(dim) % count for dim in cast(Sequence[Any], dims))
    if name in _SWAPS and len(args) == 2:
        one, other = args
    elif (name == "t" or (name == "getattr" and args == ("T",))) and count == 2:
        one, other = 0, 1
    elif name == "getattr" and args == ("mT",):
        one, other = -2, -1
    else:
        return None
    order[one], order[other] = order[other], order[one]
    return tuple(order)


def _through_reshape(source: Node, view: View) -> View | None:
    dims = deal([axis for dim in view.dims for axis in leaves(dim)], shape_of(source))
    return None if dims is None else view.of(source, dims)


def deal(axes: Sequence[Axis], shape: Sequence[Extent]) -> Dims | None:
    """Deal axes out to dimensions of these sizes, in order, splitting one where it must be.

    It then stays split for everybody. None where the boundaries do not meet.
    """
    left, dims = list(axes), list[Dim]()
    while len(dims) < len(shape):
        size = shape[len(dims)]
        if size == 1:
            dims.append((Axis(size),))
            continue
        counts = range(1, len(left) + 1)
        taken = next((n for n in counts if same(size_along(left[:n]), size)), None)
        if taken is not None:
            dims.append(tuple(left[:taken]))
            del left[:taken]
        elif left and _split(left[0], shape[len(dims) :]):
            left[:1] = leaves(left[:1])
        else:
            return None
    return tuple(dims) if not left else None


def _split(axis: Axis, sizes: Sequence[Extent]) -> bool:
    """Split an axis into the first of these sizes whose product is the axis's own."""
    if axis.at is not None:
        return False
    for count in range(2, len(sizes) + 1):
        parts = tuple(Axis(size) for size in sizes[:count])
        if same(size_along(parts), axis.size):
            axis.parts = parts
            return True
    return False


def contracted(view: View, bound: Bound) -> tuple[View, ...] | None:
    """Give the operands of a matrix product or an einsum, over its own axes and those it sums."""
    node, name = view.node, op_name(view.node)
    if name == "einsum":
        return _through_einsum(view, bound)
    operands = [arg for arg in node.args if isinstance(arg, Node)]
    if name not in ("matmul", "mm", "bmm") or len(operands) != 2 or node.kwargs:
        return None
    return multiplied(view, operands[0], operands[1], bound)


def multiplied(view: View, one: Node, other: Node, bound: Bound) -> tuple[View, View] | None:
    """See two stacks of matrices over the axes of their product; None if one is a vector."""
    left, right = shape_of(one), shape_of(other)
    if len(left) < 2 or len(right) < 2:
        return None
    inner = (bound.setdefault((view.node, "inner"), Axis(left[-1])),)
    *batch, row, column = view.dims
    return (
        View(one, (*_batch(left, batch), row, inner)),
        View(other, (*_batch(right, batch), inner, column)),
    )


def _batch(shape: tuple[Extent, ...], dims: Sequence[Dim]) -> Iterator[Dim]:
    own = shape[:-2]
    pairs = zip(own, dims[len(dims) - len(own) :], strict=True)
    return (_unless_spread(size, dim) for size, dim in pairs)


def _through_einsum(view: View, bound: Bound) -> tuple[View, ...] | None:
    equation, *rest = cast(tuple[Any, ...], view.node.args)
    operands = cast(list[Any], rest[0] if len(rest) == 1 and isinstance(rest[0], list) else rest)
    shapes = [shape_of(one) for one in operands if isinstance(one, Node)]
    spelled = letters(equation, list(map(len, shapes))) if isinstance(equation, str) else None
    if spelled is None or len(spelled[1]) != len(view.dims) or len(shapes) != len(operands):
        return None
    words, output = spelled
    dims: dict[str, Dim] = dict(zip(output, view.dims, strict=True))
    for word, shape in zip(words, shapes, strict=True):
        for letter, size in zip(word, shape, strict=True):
            if letter not in output and (letter not in dims or dims[letter][0].size == 1):
                dims[letter] = (bound.setdefault((view.node, letter, size), Axis(size)),)

    def seen(operand: Node, word: str, shape: Sequence[Extent]) -> View:
        pairs = zip(shape, word, strict=True)
        return View(operand, tuple(_unless_spread(size, dims[letter]) for size, letter in pairs))

    return tuple(map(seen, operands, words, shapes))


def letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """Read an einsum equation into one letter for each dimension; None if it is not plain."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    words = inputs.split(",")
    if not arrow or len(words) != len(ranks):
        return None
    extra = [rank - len(word.replace("...", "")) for word, rank in zip(words, ranks, strict=True)]
    if any(one < 0 or (one and "..." not in word) for word, one in zip(words, extra, strict=True)):
        return None
    words = [word.replace("...", _dots(count)) for word, count in zip(words, extra, strict=True)]
    output = output.replace("...", _dots(max(extra)))
    plain = all(len(set(word)) == len(word) for word in (*words, output))
    return (words, output) if plain and set(output) <= set("".join(words)) else None


_DOT = 0x3B1
"""The first letter that no equation has: a Greek one."""


def _dots(count: int) -> str:
    """Name the dimensions of an ellipsis, which align at the right."""
    return "".join(chr(_DOT + index) for index in reversed(range(count)))

"""Numbers that say how many tokens something has, once Python holds them.

A rule such as `rows[:512]` or `if n > 512` drops tokens in batches that are larger than any that a
module is observed with. So counts that reach Python refuse to be compared with numbers other than
0 and 1, as sizes do, and what is cut off must have been there to be cut.
"""

import builtins
import operator
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import numpy
import torch
from torch.fx import Node
from torch.utils._pytree import tree_map

from moecc.observe.sizes import Size
from moecc.observe.unrecordable import Unrecordable
from moecc.passes.pattern import op_name

_COUNTING = {"sum", "bincount", "histc", "cumsum", "numel", "size"}
_MOVING = {
    "add", "clone", "contiguous", "cpu", "detach", "flatten", "int", "long", "reshape", "squeeze",
    "sub", "to", "type", "unbind", "view",
}  # fmt: skip


class Count(int):
    """An int that a tensor of counts gave."""

    def __int__(self) -> int:
        """Refuse to become an int that may be compared with anything."""
        raise Unrecordable("it calls int() on a count of tokens, which hides where that goes")


def _kept(function: Callable[[int, int], int], turned: bool) -> Callable[..., Any]:
    """Make an operator that gives a count."""

    def operate(self: Count, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, Size):
            return NotImplemented
        pair = (other, self) if turned else (self, other)
        return Count(function(*map(int.__int__, pair)))

    return operate


def _compared(name: str) -> Callable[[Count, Any], Any]:
    plain: Callable[[int, Any], Any] = getattr(int, name)

    def compare(self: Count, other: Any) -> Any:
        if isinstance(other, int) and not isinstance(other, Count) and other not in (0, 1):
            raise Unrecordable(f"it compares a count of tokens with {other!r}")
        return plain(self, other)

    return compare


for _name, _function in {"add": operator.add, "sub": operator.sub, "mul": operator.mul}.items():
    setattr(Count, f"__{_name}__", _kept(_function, turned=False))
    setattr(Count, f"__r{_name}__", _kept(_function, turned=True))
for _comparison in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Count, _comparison, _compared(_comparison))


def plain(value: Any) -> Any:
    """Give an int for a size or a count."""
    return int.__int__(value) if isinstance(value, (Size, Count)) else value


def as_counts(value: Any) -> Any:
    """Turn the ints of a list or of an array into counts."""
    if isinstance(value, numpy.ndarray):
        array = cast("numpy.ndarray[Any, Any]", value)
        return numpy.array(as_counts(array.tolist()), dtype=object)
    return tree_map(_as_count, value)


def _as_count(value: Any) -> Any:
    return Count(value) if type(value) is int else value


def counts_tokens(node: Any) -> bool:
    """Tell whether a value was added up, rather than being ids."""
    while isinstance(node, Node):
        name = op_name(node)
        if name in _COUNTING:
            return True
        if node.target is operator.getitem:
            if op_name(cast(Node, node.args[0])) in ("unique", "unique_consecutive"):
                return bool(node.args[1] != 0)
        elif name not in _MOVING:
            return False
        node = next(iter(node.all_input_nodes), None)
    return False


@contextmanager
def sized_len() -> Generator[None]:
    """Let `len(tensor)` give its first size as `.shape[0]` does, which a recorder can follow.

    CPython makes a plain int of whatever `__len__` gives, so nothing else can tell what becomes of
    it. Other threads may see this `len`; it answers the same.
    """
    own = builtins.len

    def sized(value: Any) -> int:
        return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else own(value)

    builtins.len = sized
    try:
        yield
    finally:
        builtins.len = own


def cuts_beyond(node: Node) -> bool:
    """Tell whether a slice by constants ends where its tensor did not reach."""
    source = node.args[0] if node.target in (operator.getitem, operator.setitem) else None
    value = source.meta.get("example_value") if isinstance(source, Node) else None
    if not isinstance(value, torch.Tensor):
        return False
    given = node.args[1]
    index = cast(tuple[Any, ...], given if isinstance(given, tuple) else (given,))
    taken = sum(_dims(one) for one in index)
    dim = 0
    for one in index:
        if isinstance(one, slice):
            bounds = cast("slice[Any, Any, Any]", one)
            if any(type(to) is int and to > value.shape[dim] for to in (bounds.start, bounds.stop)):
                return True
        dim += value.dim() - taken if one is Ellipsis else _dims(one)
    return False


def _dims(index: Any) -> int:
    """Count the dimensions that one part of an index takes."""
    if index is None or index is Ellipsis:
        return 0
    value = index.meta.get("example_value") if isinstance(index, Node) else None
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return value.dim()
    return 1

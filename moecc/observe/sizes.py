"""Numbers that know how they were computed from the sizes of tensors."""

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from moecc.observe.unrecordable import Unrecordable


class Size(int):
    """An int that knows the node which computes it."""

    node: Node

    @staticmethod
    def of(value: int, node: Node) -> "Size":
        """Tie a value to its node."""
        size = Size(value)
        size.node = node
        return size


def _sized(function: Callable[[Any, Any], Any], turned: bool = False) -> Callable[..., Any]:
    """Make an operator of `Size` that records itself when both sides are ints."""

    def operate(self: Size, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return NotImplemented
        pair = (other, self) if turned else (self, other)
        value = function(*map(int, pair))
        nodes = tuple(one.node if isinstance(one, Size) else int(one) for one in pair)
        return Size.of(value, self.node.graph.call_function(function, nodes))

    return operate


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul,
    "floordiv": operator.floordiv, "mod": operator.mod,
}  # fmt: skip
for _name, _function in _OPERATORS.items():
    setattr(Size, f"__{_name}__", _sized(_function))
    setattr(Size, f"__r{_name}__", _sized(_function, turned=True))


def _compared(name: str) -> Callable[..., Any]:
    """Make a comparison of `Size` that refuses what other sizes would answer otherwise.

    0 and 1 are sizes that rewrites are tried on; an equality that holds is an assertion.
    """
    plain: Callable[[int, Any], Any] = getattr(int, name)

    def compare(self: Size, other: Any) -> Any:
        answer = plain(self, other)
        asserted = (name, answer) in (("__eq__", True), ("__ne__", False))
        if answer is not NotImplemented and other not in (0, 1) and not asserted:
            raise Unrecordable(f"it decides by a size, {int(self)}, compared with {other}")
        return answer

    return compare


for _comparison in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Size, _comparison, _compared(_comparison))

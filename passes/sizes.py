"""Compare and divide sizes, which may be symbols, without adding a guard to what is compiled.

`a == b` on a `SymInt` decides for the sizes at hand and makes Dynamo compile again for others.
"""

from collections.abc import Sequence
from typing import Any, cast

import sympy as _sympy  # pyright: ignore[reportMissingTypeStubs]
import torch

sympy: Any = _sympy
Size = int | torch.SymInt


def expression(size: Any) -> Any:
    """Give a size as an expression over the graph's symbols."""
    return sympy.sympify(cast(Any, size).node.expr if isinstance(size, torch.SymInt) else size)


def same(one: Any, other: Any) -> bool:
    """Tell whether two sizes are equal whatever the symbols stand for."""
    left, right = expression(one), expression(other)
    return bool(left == right) or bool(sympy.expand(left - right) == 0)


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Tell whether two shapes are equal whatever the symbols stand for."""
    return len(one) == len(other) and all(map(same, one, other))


def fixed(value: Any) -> float | None:
    """Give the number of a model's float, which Dynamo makes a symbol where all is dynamic.

    It is a constant of what is compiled then: another value of the attribute compiles anew.
    """
    if isinstance(value, torch.SymFloat):
        traced = cast(Any, value).node.expr
        if traced.is_Symbol or traced.is_number:  # a number once it was read
            return float(value)
    return None


def known(size: Any) -> int | None:
    """Give a size that is the same in every call, or None."""
    number = expression(size)
    return int(number) if number.is_Integer else None

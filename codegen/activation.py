"""Describe what happens between an expert's two matrix products, as a small expression.

An activation is elementwise over the first product's output. A gated expert has the leaves `gate`
and `up`, an ungated one the leaf `x`; `learned` is a vector [I] of each expert's own parameters:

    mul(silu(gate), up)                                     Mixtral, Qwen, DeepSeek
    mul(add(min(max(up, -7), 7), 1), mul(g, sigmoid(...)))  GPT-OSS, with g = min(gate, 7)
    square(relu(x))                                         Nemotron-H
    mul(mul(gelu(gate), up), learned)                       ST-MoE's multiplicative bias

Each emitter renders the expression in its own language, so a new activation needs no new kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "abs": torch.abs,
    "exp": torch.exp,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "neg": torch.neg,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "square": torch.square,
    "tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
    "mul": torch.mul,
    "sub": torch.sub,
}
OPERATIONS: dict[str, int] = dict.fromkeys(_UNARY, 1) | dict.fromkeys(_BINARY, 2)
"""Every operation an emitter must render, with its number of operands."""
LEAVES = ("gate", "up", "x", "learned")
"""Every input that an activation may read."""


@dataclass(frozen=True, slots=True)
class Expr:
    """One node of an activation: a leaf, a constant or an operation."""

    op: str
    args: tuple["Expr", ...] = ()

    def __str__(self) -> str:
        """Print the expression as it is written in reports, `mul(silu(gate), up)`."""
        return f"{self.op}({', '.join(map(str, self.args))})" if self.args else self.op

    @property
    def is_constant(self) -> bool:
        """Tell whether this node is a number."""
        return not self.args and self.op not in LEAVES

    def leaves(self) -> frozenset[str]:
        """Collect the inputs that the expression reads."""
        if self.args:
            return frozenset[str]().union(*(arg.leaves() for arg in self.args))
        return frozenset() if self.is_constant else frozenset({self.op})


GATE, UP, X, LEARNED = Expr("gate"), Expr("up"), Expr("x"), Expr("learned")


def constant(value: float) -> Expr:
    """Make a number; its text round-trips through `float`."""
    return Expr(repr(float(value)))


def apply(op: str, *args: Expr) -> Expr:
    """Build `op(args)`.

    Raises `ValueError` for an operation that emitters do not know.
    """
    if OPERATIONS.get(op) != len(args):
        raise ValueError(f"activation {op!r} with {len(args)} operands is not in {[*OPERATIONS]}")
    return Expr(op, args)


def render(expr: Expr, table: Mapping[str, str]) -> str:
    """Write the expression as source code.

    `table` maps each operation to a format string over its operands (`"silu": "silu({0})"`),
    each leaf to a variable name, and `"constant"` to a format string for a number.
    """
    if expr.args:
        return table[expr.op].format(*(render(arg, table) for arg in expr.args))
    return table["constant"].format(expr.op) if expr.is_constant else table[expr.op]


def evaluate(expr: Expr, **leaves: torch.Tensor) -> torch.Tensor:
    """Compute the expression with torch; the definition that every emitter is tested against."""
    if not expr.args:
        if expr.is_constant:
            return torch.tensor(float(expr.op), dtype=next(iter(leaves.values())).dtype)
        return leaves[expr.op]
    args = [evaluate(arg, **leaves) for arg in expr.args]
    return _UNARY[expr.op](*args) if len(args) == 1 else _BINARY[expr.op](*args)

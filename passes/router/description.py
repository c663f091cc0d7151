"""Say what a router computes, as a sequence of steps from its matrix to the routing weights.

softmax → top-8 → ÷ sum
sigmoid + bias → 4 of 8 groups (sum of top 2) → top-8 → ÷ (sum + 1e-20) → × 2.5
"""

from dataclasses import dataclass, fields
from typing import Any

from moecc.passes.router.steps import Logits, SparseMixer, Step, Table, TopK, Unknown, chain_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """How one block's `ids` and `weights` are made from the hidden state."""

    steps: tuple[Step, ...]
    """In the order of computation; the router's own matrix is the step `Logits`."""
    dtype: str = ""
    """What the scores are computed in, `float32`."""
    reads: str = ""
    """The node that the router reads, if it is not the experts' hidden state."""

    @property
    def logits(self) -> Logits | None:
        """The router's matrix; None if it was not found."""
        return next((step for step in self.steps if isinstance(step, Logits)), None)

    @property
    def active(self) -> int | None:
        """K, the experts chosen for a token."""
        chosen = (step.k for step in self.steps if isinstance(step, TopK | Table | SparseMixer))
        return next(chosen, None)

    @property
    def unknown(self) -> tuple[Unknown, ...]:
        """Where reading stopped; empty when everything is described."""
        return tuple(step for step in self.steps if isinstance(step, Unknown))

    def to_dict(self) -> dict[str, Any]:
        """Give the description as plain values; a step is its class's name and its fields."""
        logits = self.logits
        return {
            "text": str(self),
            "steps": list(map(step_dict, self.steps)),
            "unknown": bool(self.unknown),
            "matrix": None if logits is None else [logits.classes, logits.features],
            "matrix_bias": logits is not None and logits.bias,
            "dtype": self.dtype,
            "reads": self.reads,
        }

    def __str__(self) -> str:
        return chain_text(self.steps)


def step_dict(step: Step) -> dict[str, Any]:
    """Give a step as its class's name and its fields; JSON has no infinity, so that is a text."""
    found = {field.name: getattr(step, field.name) for field in fields(step)}
    for name, value in found.items():
        if isinstance(value, tuple):
            found[name] = list(map(step_dict, value))  # pyright: ignore[reportUnknownArgumentType]
        elif value in (float("inf"), float("-inf")):
            found[name] = str(value)
    return {"step": type(step).__name__} | found

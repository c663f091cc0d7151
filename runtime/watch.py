"""Notice which tensors a model's blocks read their experts from, while it runs."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Use:
    """The weights of one call of `moecc::experts`."""

    kernel: str
    """Its key."""
    active: int
    """K."""
    gate_up: torch.Tensor
    """[E, ., .], as the others."""
    down: torch.Tensor
    up: torch.Tensor | None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names of a record."""
        found = {"gate_up": self.gate_up, "down": self.down, "up": self.up}
        return {name: one for name, one in found.items() if one is not None}


uses: list[list[Use]] = []
"""Of everyone who watches at the moment."""


@contextmanager
def watching() -> Generator[list[Use]]:
    """Collect what every call in this process reads, meanwhile."""
    mine: list[Use] = []
    uses.append(mine)
    try:
        yield mine
    finally:
        uses[:] = [one for one in uses if one is not mine]  # equal ones may be others'

"""Notice which tensors a model's blocks read their experts from, while it runs."""

import threading
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


class _Thread(threading.local):
    def __init__(self) -> None:
        self.watchers: list[list[Use]] = []


_thread = _Thread()


def watchers() -> list[list[Use]]:
    """List what everyone who watches this thread has collected."""
    return _thread.watchers


@contextmanager
def watching() -> Generator[list[Use]]:
    """Collect what every call in this thread reads, meanwhile."""
    mine: list[Use] = []
    _thread.watchers.append(mine)
    try:
        yield mine
    finally:
        # equal ones may be others'
        _thread.watchers[:] = [one for one in _thread.watchers if one is not mine]

"""Tell a kernel where a block's experts are, and copy that to its device only when it changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(slots=True)
class SlotTable:
    """The slot of each expert, [E] int64, as one call of the kernel after the other reads it."""

    experts: int
    """E."""
    _host: np.ndarray = field(init=False)
    _there: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._host = np.full(self.experts, -1, np.int64)

    def show(
        self, slots: Mapping[int, int], wanted: Sequence[int], device: torch.device
    ) -> torch.Tensor:
        """Give a table with the `wanted` experts in these slots; without one, -1: not there.

        Wanted is all that the tokens of a call name. Whatever stands for others, nobody reads, so
        calls that find the same experts in the same slots share a table.
        """
        found = [slots.get(expert, -1) for expert in wanted]
        if self._there is None or self._host[wanted].tolist() != found:
            self._host[wanted] = found
            table = torch.from_numpy(self._host)
            if device.type == "cuda":  # from a copy that is pinned, or the host would wait for it
                table = table.pin_memory().to(device, non_blocking=True)
            self._there = table
        return self._there

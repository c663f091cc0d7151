"""Lend a block's experts that are all in memory, packed in a scheme."""

from dataclasses import dataclass, field, replace

import torch

from moecc.runtime.ops import AddExpertsFn
from moecc.runtime.schemes.scheme import Schemes


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """The experts of one block in memory, where the model has none of its own."""

    schemes: Schemes | None
    tensors: dict[str, torch.Tensor]
    """By the names of a record, [E, ...]."""
    slots: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        first = self.tensors["gate_up"]
        slots = torch.arange(len(first), dtype=torch.int64, device=first.device)
        object.__setattr__(self, "slots", slots)

    def to(self, device: torch.device) -> "Resident":
        """Give the same experts on a device."""
        tensors = {name: one.to(device) for name, one in self.tensors.items()}
        return replace(self, tensors=tensors)

    def run(
        self,
        add: AddExpertsFn,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *biases: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the block, as `Bank.run` does."""
        onto = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        tensors = self.tensors
        experts = (tensors["gate_up"], tensors["down"], *biases, tensors.get("up"))
        add(onto, self.slots, hidden, ids, weights, *experts)
        return onto.to(hidden.dtype)

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Do nothing: every expert is here."""

    def recall(self, tokens: torch.Tensor, active: int) -> None:
        """Do nothing: every expert is here."""

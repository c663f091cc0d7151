"""Lend a block's experts that are in memory: all, packed in a scheme, or one rank's share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moecc.runtime.ops import AddExpertsFn
from moecc.runtime.schemes.scheme import Schemes


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """The experts of one block in memory, where the model has none of its own."""

    schemes: Schemes | None
    tensors: dict[str, torch.Tensor]
    """By the names of a record, [held, ...]."""
    held: Sequence[int]
    """The experts there, ascending."""
    slots: torch.Tensor
    """int64 [E]: where each of the block's experts lies; -1 for one that another rank has."""

    @staticmethod
    def of(
        tensors: dict[str, torch.Tensor], held: Sequence[int], experts: int, schemes: Schemes | None
    ) -> "Resident":
        """Lend some of a block's experts, or all."""
        slots = torch.full((experts,), -1, device=tensors["gate_up"].device)
        slots[list(held)] = torch.arange(len(held), device=slots.device)
        return Resident(schemes=schemes, tensors=tensors, held=held, slots=slots)

    def to(self, device: torch.device) -> "Resident":
        """Give the same experts on a device."""
        tensors = {name: one.to(device) for name, one in self.tensors.items()}
        return Resident.of(tensors, self.held, len(self.slots), self.schemes)

    def run(
        self,
        add: AddExpertsFn,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *biases: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the block, as `Bank.run` does."""
        tensors = self.tensors
        wide = torch.promote_types(hidden.dtype, torch.float32)
        onto = hidden.new_zeros(hidden.shape, dtype=wide)
        experts = (tensors["gate_up"], tensors["down"], *biases, tensors.get("up"))
        add(onto, self.slots, hidden, ids, weights, *experts)
        return onto.to(hidden.dtype)

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Do nothing: every expert is here."""

    def recall(self, tokens: torch.Tensor, active: int) -> None:
        """Do nothing: every expert is here."""

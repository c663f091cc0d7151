"""What calibration saw of the inputs of experts: how much errors of each column weigh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """The inputs of one block's experts."""

    first: torch.Tensor
    """Sum over tokens of their squares, float32 [E, H]."""
    second: torch.Tensor
    """Of activated values, [E, I]."""
    seen: torch.Tensor
    """Tokens of each expert, int64 [E]."""

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Give what columns of both products weigh; None for an expert that had no token."""
        return (self.first[expert], self.second[expert]) if self.seen[expert] else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The inputs of all experts of a model on some text."""

    blocks: Mapping[str, Importance]
    """By the path of the experts' module."""
    tokens: int
    digest: str
    """Of these tokens."""

    def __str__(self) -> str:
        """Say how much was seen, and which experts were not."""
        unseen = {
            path: cast("list[int]", (one.seen == 0).nonzero().flatten().tolist())
            for path, one in self.blocks.items()
        }
        names = ", ".join(f"{path} {experts}" for path, experts in unseen.items() if experts)
        rest = f"experts without a token, fitted without: {names}" if names else "every expert seen"
        return f"calibrated on {self.tokens:,} tokens ({self.digest}); {rest}"

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
    products: tuple[torch.Tensor, torch.Tensor] | None = None
    """Instead of squares alone, sums of inputs' products with each other: [E, H, H], [E, I, I]."""

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Give what columns of both products weigh, or with `products` matrices of them.

        None for an expert that had no token; columns alone for one that had too few.
        """
        if not self.seen[expert]:
            return None
        if self.products is not None and not self.too_few[expert]:
            return self.products[0][expert], self.products[1][expert]
        return self.first[expert], self.second[expert]

    @property
    def too_few(self) -> torch.Tensor:
        """Tell which experts had fewer tokens than inputs: bool [E]."""
        return self.seen < self.first.shape[1]

    def add(self, expert: int, inputs: torch.Tensor, activated: torch.Tensor) -> None:
        """Add what an expert's two products multiply, [T, H] and [T, I]."""
        for number, seen in enumerate((inputs.float(), activated.float())):
            (self.first, self.second)[number][expert] += seen.square().sum(0)
            if self.products is not None:
                self.products[number][expert] += seen.T @ seen
        self.seen[expert] += len(inputs)


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
        unseen = _named({path: one.seen == 0 for path, one in self.blocks.items()})
        said = "every expert seen"
        if unseen:
            said = f"experts without a token, fitted without: {unseen}"
        if any(one.products is not None for one in self.blocks.values()):
            few = _named({path: one.too_few for path, one in self.blocks.items()})
            said += "; errors compensated"
            if few:
                said += f", but for experts with too few tokens: {few}"
        return f"calibrated on {self.tokens:,} tokens ({self.digest}); {said}"


def _named(marked: Mapping[str, torch.Tensor]) -> str:
    """Name experts by block: bool [E] of each."""
    found = {
        path: cast("list[int]", one.nonzero().flatten().tolist()) for path, one in marked.items()
    }
    return ", ".join(f"{path} {experts}" for path, experts in found.items() if experts)

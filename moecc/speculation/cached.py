"""Draft with the experts that are in the cache: no copies, no slots given up, and no waiting."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moecc.runtime.errors import InputError
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.stand_in import lender_of
from moecc.runtime.ops import AddExpertsFn
from moecc.runtime.schemes.scheme import Schemes
from moecc.runtime.twins import Twins
from moecc.runtime.watch import Use

CACHED = "cached"
"""The name of this source of drafts."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cached:
    """A block of the draft: the model's own experts, as far as they are there."""

    bank: Bank

    @property
    def schemes(self) -> Schemes | None:
        """Of the experts."""
        return self.bank.schemes

    def run(
        self,
        add: AddExpertsFn,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *biases: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the block, as `Bank.sketch` does."""
        return self.bank.sketch(add, hidden, ids, weights, *biases)

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Do nothing: a draft names the experts themselves."""

    def recall(self, tokens: torch.Tensor, active: int) -> None:
        """Do nothing, likewise."""


def draft_on_cached(twins: Twins, uses: Sequence[Use]) -> None:
    """Let drafts compute blocks with what their caches hold; others compute as they are.

    Raises `InputError` when no block has a cache.
    """
    for use in uses:
        lender = lender_of(use.gate_up)
        if isinstance(lender, Bank):
            twins.lenders[use.gate_up.data_ptr()] = Cached(bank=lender)
    if not twins.lenders:
        raise InputError(
            "draft='cached' computes with the experts in a cache, and this model has none: load it "
            "with expert_memory=, or draft with copies, as in draft='int4'"
        )

"""Keep what ranks know of one block: who holds its experts, how busy they are, what was sent.

It hangs on the block's first weight, which every road to the kernel has in hand, so that one
compiled graph serves several layers.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch

from moecc.runtime.parallel.placement import Placement

_ATTRIBUTE = "moecc_share"
HALF_LIFE = 4096
"""Tokens after which a choice counts half in the measured load."""


@dataclass(slots=True, kw_only=True, eq=False)
class Share:
    """One block, shared among ranks."""

    placement: Placement
    rank: int
    """This one."""
    across: str
    """The exchange that runs around the kernel; empty where that is over."""
    load: torch.Tensor = field(init=False)
    """float64 [E]: choices by the tokens that this rank routed, older ones decayed."""
    counts: Counter[str] = field(default_factory=Counter[str])
    """Calls by collective (`all_to_all`, `gather`, `scatter`), tokens, and bytes that this rank
    sent to others: `sent` for tokens and results, `headers` for agreeing on how many."""
    _tables: tuple[torch.Tensor, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.load = torch.zeros(len(self.placement.holders), dtype=torch.float64)
        self.move(self.placement)

    def move(self, placement: Placement) -> None:
        """Have tokens go elsewhere from the next call on."""
        self.placement, self._tables = placement, placement.tables()

    def ranks_for(self, ids: torch.Tensor, sender: int = 0) -> torch.Tensor:
        """Say which rank computes each choice of [T, K]; -1 for an id that is no expert.

        Tokens take the copies of an expert in turn, by their number and that of their sender.
        """
        holders, count = (table.to(ids.device) for table in self._tables)
        known = (ids >= 0) & (ids < len(count))
        safe = ids.where(known, 0)
        turn = torch.arange(sender, sender + len(ids), device=ids.device).unsqueeze(1)
        return holders[safe, turn % count[safe]].where(known, -1)

    def learn(self, ids: torch.Tensor) -> None:
        """Add the choices of some tokens to the load."""
        known = ids[(ids >= 0) & (ids < len(self.load))].reshape(-1).cpu()
        self.load *= 0.5 ** (len(ids) / HALF_LIFE)
        self.load += torch.bincount(known, minlength=len(self.load))
        self.counts["tokens"] += len(ids)


def share_of(weight: torch.Tensor) -> Share | None:
    """Give the share that a weight is bound to."""
    return getattr(weight, _ATTRIBUTE, None)


def bind_share(weight: torch.Tensor, share: Share) -> None:
    """Let whoever runs the block of this weight know its share."""
    setattr(weight, _ATTRIBUTE, share)

"""Decide which ranks hold each expert of a block: numbers in, numbers out.

Experts are unequally popular, and a layer takes as long as its busiest rank. So popular experts get
copies, whose tokens are shared evenly, and all copies are spread by load: the busiest first, each
to the least loaded rank (Graham 1969), then swapped while that helps. DeepSeek-V3 (arXiv
2412.19437, section 3.4) describes the need.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The ranks that hold each expert of a block."""

    ranks: int
    holders: tuple[tuple[int, ...], ...]
    """By expert, ascending; at least one each."""

    def held_by(self, rank: int) -> list[int]:
        """List the experts that a rank holds, ascending."""
        return [expert for expert, ranks in enumerate(self.holders) if rank in ranks]

    def loads(self, load: Sequence[float]) -> list[float]:
        """Add up each rank's share of the experts' load, copies taking equal parts."""
        sums = [0.0] * self.ranks
        for expert, holders in enumerate(self.holders):
            for rank in holders:
                sums[rank] += load[expert] / len(holders)
        return sums

    def imbalance(self, load: Sequence[float]) -> float:
        """Give the busiest rank's load over the mean: 1 is balanced, the number of ranks worst."""
        sums = self.loads(load)
        return max(sums) * self.ranks / total if (total := sum(sums)) else 1.0

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Give holders as int64 [E, C], the last ones repeated, and how many they are [E]."""
        most = max(map(len, self.holders))
        rows = [[*ranks, *ranks[-1:] * (most - len(ranks))] for ranks in self.holders]
        return torch.tensor(rows), torch.tensor([len(ranks) for ranks in self.holders])


def contiguous(experts: int, ranks: int) -> Placement:
    """Give each rank neighbouring experts, the first ranks one more where they do not divide."""
    least, more = divmod(experts, ranks)
    sizes = [least + (rank < more) for rank in range(ranks)]
    holders = tuple((rank,) for rank, size in enumerate(sizes) for _ in range(size))
    return Placement(ranks=ranks, holders=holders)


def balanced(load: Sequence[float], ranks: int, spare: int = 0) -> Placement:
    """Place experts by their load; every rank holds `spare` copies beside its even share, at most.

    A copy of an expert is never beside another. Equal loads give equal placements in all ranks.
    """
    tried = [_balanced(load, ranks, copies) for copies in range(spare + 1)]
    return min(tried, key=lambda one: one.imbalance(load))  # the fewest copies of the best


def _balanced(load: Sequence[float], ranks: int, spare: int) -> Placement:
    experts = len(load)
    room = [len(contiguous(experts, ranks).held_by(rank)) + spare for rank in range(ranks)]
    copies = _copies(load, ranks, spare * ranks)
    held: list[set[int]] = [set() for _ in range(ranks)]
    sums = [0.0] * ranks
    order = sorted(range(experts), key=lambda expert: (-load[expert] / copies[expert], expert))
    for expert in order:
        for _ in range(copies[expert]):
            free = [r for r in range(ranks) if len(held[r]) < room[r] and expert not in held[r]]
            if free:  # always for the first copy: there is room for as many as there are copies
                rank = min(free, key=lambda r: (sums[r], r))
                held[rank].add(expert)
                sums[rank] += load[expert] / copies[expert]
    placement = _placement(held, experts)
    while (better := _swapped(placement, load)) is not None:
        placement = better
    return placement


def _copies(load: Sequence[float], ranks: int, spare: int) -> list[int]:
    """Give one more copy at a time to the expert whose copies are busiest."""
    copies = [1] * len(load)
    for _ in range(spare):
        able = [expert for expert, count in enumerate(copies) if count < ranks and load[expert] > 0]
        if not able:
            break
        copies[max(able, key=lambda expert: load[expert] / copies[expert])] += 1
    return copies


def _swapped(placement: Placement, load: Sequence[float]) -> Placement | None:
    """Swap two experts so that the busiest rank has the least to do; None if no swap helps."""
    sums = placement.loads(load)
    busiest = max(range(placement.ranks), key=lambda rank: sums[rank])
    held = [set(placement.held_by(rank)) for rank in range(placement.ranks)]
    weight = [one / len(ranks) for one, ranks in zip(load, placement.holders, strict=True)]
    best, most = None, sums[busiest] * (1 - 1e-9)  # rounding is no gain
    for rank in range(placement.ranks):
        for given in held[busiest] - held[rank]:
            for taken in held[rank] - held[busiest]:
                gain = weight[given] - weight[taken]
                worst = max(sums[busiest] - gain, sums[rank] + gain)
                if worst < most:
                    best, most = (rank, given, taken), worst
    if best is None:
        return None
    rank, given, taken = best
    held[busiest] ^= {given, taken}
    held[rank] ^= {given, taken}
    return _placement(held, len(load))


def _placement(held: Sequence[set[int]], experts: int) -> Placement:
    holders = [tuple(r for r, here in enumerate(held) if e in here) for e in range(experts)]
    return Placement(ranks=len(held), holders=tuple(holders))

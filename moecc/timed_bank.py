"""Note when banks are called and when their kernels run, from outside of them."""

import time
from dataclasses import dataclass, field
from typing import cast

import torch

from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.stand_in import Lender
from moecc.runtime.ops import AddExpertsFn
from moecc.runtime.schemes.scheme import Schemes


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a bank; times in seconds of `time.perf_counter`."""

    block: int
    tokens: int
    experts: int
    start: float
    end: float
    kernels: tuple[tuple[float, float], ...]
    """Begin and end of each call of its kernel."""
    demand_wait: float
    prefetch_wait: float

    @property
    def compute(self) -> float:
        """Seconds in kernels."""
        return sum(end - start for start, end in self.kernels)

    @property
    def overhead(self) -> float:
        """Seconds that were neither computed nor waited."""
        waited = self.demand_wait + self.prefetch_wait
        return self.end - self.start - self.compute - waited


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TimedBank:
    """A lender that notes when it is called."""

    bank: Bank
    calls: list[Call]
    """Of all banks, in order."""
    lender: Lender | None = None
    """What is called; None is the bank."""
    apart: int = 0
    """Compute one token's experts one by one in every second run of so many calls; 0 is never."""
    foretells: bool = True
    """Pass predictions on."""
    schemes: Schemes | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schemes", self.bank.schemes)

    def run(
        self,
        add: AddExpertsFn,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *biases: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the block."""
        split = self.apart and len(hidden) == 1 and len(self.calls) // self.apart % 2 == 1
        kernels: list[tuple[float, float]] = []

        def timed(onto: torch.Tensor, slots: torch.Tensor, *arguments: torch.Tensor | None) -> None:
            for table in _one_by_one(slots) if split else (slots,):
                began = time.perf_counter()
                add(onto, table, *arguments)
                kernels.append((began, time.perf_counter()))

        counts = self.bank.pool.trace.counts
        waited, late = counts.wait_seconds, counts.late_seconds
        start = time.perf_counter()
        out = (self.lender or self.bank).run(timed, hidden, ids, weights, *biases)
        end = time.perf_counter()
        late = counts.late_seconds - late
        call = Call(
            block=self.bank.number,
            tokens=len(hidden),
            experts=len(set(cast(list[int], ids.flatten().tolist()))),
            start=start,
            end=end,
            kernels=tuple(kernels),
            demand_wait=counts.wait_seconds - waited - late,
            prefetch_wait=late,
        )
        self.calls.append(call)
        return out

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Pass a prediction on, if that is wanted."""
        if self.foretells:
            (self.lender or self.bank).foretell(scores, active, distance)

    def recall(self, tokens: torch.Tensor, active: int) -> None:
        """Pass tokens on, if predictions are wanted."""
        if self.foretells:
            (self.lender or self.bank).recall(tokens, active)


def _one_by_one(slots: torch.Tensor) -> list[torch.Tensor]:
    """Split a table of experts' slots into tables of one expert each."""
    tables: list[torch.Tensor] = []
    for expert in cast(list[int], (slots >= 0).nonzero().flatten().tolist()):
        table = torch.full_like(slots, -1)
        table[expert] = slots[expert]
        tables.append(table)
    return tables

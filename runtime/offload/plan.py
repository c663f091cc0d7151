"""Decide how many slots each block gets out of a budget of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from moecc.runtime.errors import OptionError
from moecc.runtime.offload.trace import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one block would like to keep in memory."""

    name: str
    experts: int
    """E."""
    active: int
    """K: what one token needs; 1 where it is not known."""
    size: int
    """Bytes of an expert's record."""

    @property
    def bytes(self) -> int:
        """Of all experts."""
        return self.experts * self.size


def share_slots(demands: Sequence[Demand], memory: int | float) -> tuple[int, ...]:
    """Share a budget, in bytes or as a part of all experts, evenly among blocks.

    Every block gets the same part of its experts, rounded down, and what is left over goes to the
    first blocks, one slot each. Raises `OptionError` with the smallest budget that works when a
    token's experts do not fit.
    """
    total = sum(demand.bytes for demand in demands)
    budget = _budget(demands, memory)
    part = min(1.0, budget / total) if total else 1.0
    slots = [max(demand.active, int(part * demand.experts)) for demand in demands]
    left = budget - sum(map(_bytes, demands, slots))
    while left < 0:  # small blocks were rounded up to a token's demand
        most = max(range(len(slots)), key=lambda i: slots[i] - demands[i].active)
        slots[most] -= 1
        left += demands[most].size
    for number, demand in enumerate(demands):
        if slots[number] < demand.experts and demand.size <= left:
            slots[number] += 1
            left -= demand.size
    return tuple(slots)


def share_by_benefit(
    demands: Sequence[Demand], memory: int | float, requests: Sequence[Request]
) -> tuple[int, ...]:
    """Share a budget so that as many as possible of a trace's requests hit under LRU.

    Every block has a token's experts at least. Then the slots that gain most hits a byte are added
    again and again, several at once where only several gain. Raises `OptionError` as `share_slots`
    does.
    """
    curves = [
        hits_by_slots([one.experts for one in requests if one.block == number], demand.experts)
        for number, demand in enumerate(demands)
    ]
    slots = [demand.active for demand in demands]
    left = _budget(demands, memory) - sum(map(_bytes, demands, slots))

    def worth(step: tuple[int, int]) -> tuple[float, float]:
        number, added = step
        has, size = slots[number], demands[number].size
        gained = curves[number][has + added] - curves[number][has]
        return gained / added / size, -has / demands[number].experts  # of equals, the emptiest

    while steps := [
        (number, added)
        for number, one in enumerate(demands)
        for added in range(1, 1 + min(one.experts - slots[number], left // one.size))
    ]:
        number, added = max(steps, key=worth)
        slots[number] += added
        left -= added * demands[number].size
    return tuple(slots)


def hits_by_slots(requests: Sequence[Sequence[int]], experts: int) -> list[int]:
    """Count hits under LRU for every number of slots from 0 to E, in one pass (Mattson, 1970).

    An expert hits if it is among the last so many different ones that were asked for.
    """
    recent: list[int] = []
    found_at = [0] * experts
    for wanted in requests:
        for expert in wanted:
            if expert in recent:
                found_at[recent.index(expert)] += 1
        recent = [*wanted, *(expert for expert in recent if expert not in wanted)]
    return [sum(found_at[:slots]) for slots in range(experts + 1)]


def _budget(demands: Sequence[Demand], memory: int | float) -> int:
    """Give the budget in bytes."""
    total = sum(demand.bytes for demand in demands)
    budget = int(memory * total) if isinstance(memory, float) else memory
    smallest = sum(demand.active * demand.size for demand in demands)
    if budget < smallest:
        raise OptionError(
            f"expert_memory is {budget:,} bytes and the experts of a single token take "
            f"{smallest:,} in {len(demands)} blocks; that is the smallest that works"
        )
    return budget


def _bytes(demand: Demand, slots: int) -> int:
    return demand.size * slots

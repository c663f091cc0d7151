"""Decide how many slots each block gets out of a budget of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from moecc.runtime.errors import OptionError


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
    budget = int(memory * total) if isinstance(memory, float) else memory
    smallest = sum(demand.active * demand.size for demand in demands)
    if budget < smallest:
        raise OptionError(
            f"expert_memory is {budget:,} bytes and the experts of a single token take "
            f"{smallest:,} in {len(demands)} blocks; that is the smallest that works"
        )
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


def _bytes(demand: Demand, slots: int) -> int:
    return demand.size * slots

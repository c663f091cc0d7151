"""Slots by benefit: where a trace says that they help most."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.runtime.errors import OptionError
from moecc.runtime.offload.plan import Demand, hits_by_slots, share_by_benefit, share_slots
from moecc.runtime.offload.replay import replay
from moecc.runtime.offload.trace import Request

DEMANDS = [Demand(name=f"layers.{n}", experts=16, active=2, size=100) for n in range(3)]


def requests(count: int = 300) -> list[Request]:
    """Make blocks that use 3, 8 and 16 of their experts."""
    chance = random.Random(2)
    return [
        Request(block=n, tokens=1, experts=tuple(sorted(chance.sample(range(used), 2))), hits=0)
        for _ in range(count)
        for n, used in enumerate((3, 8, 16))
    ]


def test_the_curve_is_what_replays_give() -> None:
    made = [one for one in requests() if one.block == 1]
    curve = hits_by_slots([one.experts for one in made], 16)
    assert curve[0] == 0
    for slots in range(2, 17):
        exact = replay(made, slots, "lru").hits
        assert abs(curve[slots] - exact) <= 0.02 * 2 * len(made)  # ties fall otherwise


def test_slots_go_where_they_are_hit() -> None:
    made = requests()
    slots = share_by_benefit(DEMANDS, 18 * 100, made)
    assert sum(slots) == 18
    assert slots[0] == 3
    even = share_slots(DEMANDS, 18 * 100)

    def hits(shares: tuple[int, ...]) -> int:
        return sum(
            replay([one for one in made if one.block == n], count, "lru").hits
            for n, count in enumerate(shares)
        )

    assert hits(slots) > hits(even)


def test_an_empty_trace_shares_evenly() -> None:
    assert share_by_benefit(DEMANDS, 18 * 100, []) == (6, 6, 6)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 99)), min_size=1, max_size=4
    ),
    st.floats(0.01, 1.0),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8)), max_size=12),
)
def test_no_share_exceeds_its_budget(
    blocks: list[tuple[int, int, int]], part: float, asked: list[tuple[int, int]]
) -> None:
    demands = [
        Demand(name=str(n), experts=max(pair), active=min(pair), size=size)
        for n, (*pair, size) in enumerate(blocks)
    ]
    made = [
        Request(block=block, tokens=1, experts=(expert % demands[block].experts,), hits=0)
        for block, expert in asked
        if block < len(demands)
    ]
    smallest = sum(one.active * one.size for one in demands)
    memory = max(smallest, int(part * sum(one.bytes for one in demands)))
    for slots in (share_slots(demands, memory), share_by_benefit(demands, memory, made)):
        assert sum(one.size * n for one, n in zip(demands, slots, strict=True)) <= memory
        assert all(d.active <= n <= d.experts for d, n in zip(demands, slots, strict=True))


def test_a_budget_below_a_tokens_demand_is_refused_alike() -> None:
    for share in (share_slots, lambda demands, memory: share_by_benefit(demands, memory, [])):
        with pytest.raises(OptionError, match="600"):
            share(DEMANDS, 599)

"""Which ranks hold an expert."""

from hypothesis import given
from hypothesis import strategies as st

from moecc.runtime.parallel.placement import balanced, contiguous

LOADS = st.lists(st.integers(0, 1000), min_size=1, max_size=24)


@given(LOADS, st.integers(1, 6), st.integers(0, 3))
def test_every_expert_has_a_place_and_no_rank_more_than_its_room(
    load: list[int], ranks: int, spare: int
) -> None:
    placement = balanced(load, ranks, spare)
    even = contiguous(len(load), ranks)
    for rank in range(ranks):
        assert len(placement.held_by(rank)) <= len(even.held_by(rank)) + spare
    for holders in placement.holders:
        assert holders
        assert list(holders) == sorted(set(holders))
    assert (
        sum(placement.loads(load)) == sum(load)
        or abs(sum(placement.loads(load)) - sum(load)) < 1e-6
    )
    assert placement == balanced(load, ranks, spare)


@given(LOADS, st.integers(2, 6))
def test_no_swap_of_two_experts_would_help(load: list[int], ranks: int) -> None:
    placement = balanced(load, ranks)
    sums = placement.loads(load)
    busiest = sums.index(max(sums))
    for mine in placement.held_by(busiest):
        for rank in set(range(ranks)) - {busiest}:
            for other in placement.held_by(rank):
                gain = load[mine] - load[other]
                assert max(sums[busiest] - gain, sums[rank] + gain) >= max(sums) * (1 - 1e-9)


def test_neighbours_go_to_one_rank_and_the_first_ranks_have_one_more() -> None:
    assert contiguous(7, 3).holders == ((0,), (0,), (0,), (1,), (1,), (2,), (2,))


def test_two_popular_experts_part_and_a_very_popular_one_gets_a_copy() -> None:
    load = [90, 80, 10, 20]
    assert contiguous(4, 2).imbalance(load) == 1.7
    assert balanced(load, 2).imbalance(load) == 1.0
    single = [100, 10, 10, 10]
    assert balanced(single, 2).imbalance(single) > 1.6
    assert balanced(single, 2, spare=1).imbalance(single) < 1.1


def test_no_load_is_balanced() -> None:
    assert balanced([0, 0, 0], 2, spare=1).imbalance([0, 0, 0]) == 1.0

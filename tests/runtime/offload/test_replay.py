"""Replaying a run's own trace gives its hits and misses; other caches are told by the same code."""

import random
from pathlib import Path

import pytest
import torch

from moecc.runtime.offload.link import Link
from moecc.runtime.offload.policy import POLICIES
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.replay import replay, turns_until
from moecc.runtime.offload.trace import Guess, Request
from tests.runtime.offload.test_bank import EXPERTS, Block, foretell


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [2, 3, 5])
def test_a_runs_own_trace_gives_its_own_counts(tmp_path: Path, policy: str, slots: int) -> None:
    random.seed(slots)
    block, link = Block(tmp_path, "native", torch.float32), Link()
    pool = Pool(block.store.layout, slots, POLICIES[policy], link)
    bank = block.bank(pool)
    pool.trace.recording = True
    for _ in range(40):
        block.check(bank, block.batch(random.choice([1, 1, 1, 4, 40])))
        if random.random() < 0.5:
            foretell(bank)
    counts = pool.trace.counts
    assert counts.predicted > 0
    again = replay(pool.trace.events, slots, policy, predictions="recorded")
    assert (again.asked, again.hits) == (counts.experts, counts.hits)
    assert (again.misses, again.predicted) == (counts.misses, counts.predicted)
    link.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_that_blocks_share_counts_as_its_replay(tmp_path: Path, policy: str) -> None:
    random.seed(3)
    blocks, link = [Block(tmp_path, "native", torch.float32, number) for number in range(3)], Link()
    pool = Pool(blocks[0].store.layout, 5, POLICIES[policy], link)
    banks = [block.bank(pool) for block in blocks]
    pool.trace.recording = True
    for turn in range(60):
        if random.random() < 0.5:
            foretell(banks[turn % 3])
        blocks[turn % 3].check(banks[turn % 3], blocks[turn % 3].batch(random.choice([1, 1, 4])))
    counts = pool.trace.counts
    again = replay(pool.trace.events, 5, policy, predictions="recorded")
    told = (counts.experts, counts.hits, counts.predicted)
    assert (again.asked, again.hits, again.predicted) == told
    link.close()


def test_a_prediction_is_spared_until_its_blocks_turn() -> None:
    def request(block: int, *experts: int) -> Request:
        return Request(block=block, tokens=1, experts=experts, hits=0)

    after = [request(0, 1), request(1, 1), request(2, 7)]
    events = [request(2, 0), Guess(keys=((2, 7),)), *after]
    assert [turns_until([(2, 0)], latest, [0, 2, 5]) for latest in (0, 2, 5)] == [1, 3, 2]
    assert replay(events, 2, "lookahead", predictions="recorded").hits == 1


def requests(count: int = 300) -> list[Request]:
    """Make single tokens whose experts repeat, as those of text do."""
    chance = random.Random(1)
    made: list[Request] = []
    liked = [0, 1]
    for _ in range(count):
        if chance.random() < 0.4:
            liked = chance.sample(range(EXPERTS), 2)
        made.append(Request(block=0, tokens=1, experts=tuple(sorted(liked)), hits=0))
    return made


def test_no_policy_beats_belady() -> None:
    events = requests()
    for slots in (2, 3, 4, 5):
        best = replay(events, slots, "belady").hits
        assert all(replay(events, slots, policy).hits <= best for policy in POLICIES)


def test_more_slots_never_hurt_lru() -> None:
    hits = [replay(requests(), slots, "lru").hits for slots in range(2, EXPERTS + 1)]
    assert hits == sorted(hits)
    everything = replay(requests(), EXPERTS, "lru")
    assert everything.misses == len({e for one in requests() for e in one.experts})


def test_an_empty_trace_has_missed_nothing() -> None:
    assert replay([], 4, "lru").hit_rate == 1.0


@pytest.mark.parametrize(("slots", "kept"), [(4, 2), (8, 4), (16, 8), (32, 32)])
def test_a_prefill_finds_half_of_what_the_one_before_left(slots: int, kept: int) -> None:
    every = Request(block=0, tokens=64, experts=tuple(range(32)), hits=0)
    assert replay([every], slots, "lru").hits == 0
    assert replay([every, every], slots, "lru").hits == kept

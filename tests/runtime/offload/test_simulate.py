"""Simulated runs count what replays count, and take the time that the profile implies."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from moecc.runtime.errors import OptionError
from moecc.runtime.offload import profile as profiles
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.profile import ComputeSpeed, LinkSpeed, Profile
from moecc.runtime.offload.recording import Pooled, Recording
from moecc.runtime.offload.replay import PREDICTIONS, REPLAYED, replay
from moecc.runtime.offload.simulate import GOVERNED, simulate
from moecc.runtime.offload.simulate_drafts import Draft, simulate_drafts
from moecc.runtime.offload.simulated_link import SimulatedLink
from moecc.runtime.offload.trace import Event, Guess, Ranking, Request

SIZE = 3_000_000
"""Three chunks."""
NOTHING = ComputeSpeed(
    bandwidth=1e30, balance=1, launch=0, call=0, layer=0, token=0, beside_reads=1, after_reads=1
)
SLOW = Profile(
    name="slow", tier="none", source="made up", compute=NOTHING,
    link=LinkSpeed(bandwidth=1e9, stream=1e9, latency=0),
)  # fmt: skip

DRAFT = Draft(depth=0, token=1.0, experts=1.0, size=0.25)


def recording(tokens: int = 200, blocks: int = 3, right: float = 0.8) -> Recording:
    """Make tokens whose experts repeat, and predictions that are often right."""
    chance = random.Random(1)
    events: list[Event] = []
    liked = [[0, 1] for _ in range(blocks)]
    for _ in range(tokens):
        for block in range(blocks):
            if chance.random() < 0.4:
                liked[block] = sorted(chance.sample(range(8), 2))
            if block:
                first = liked[block] if chance.random() < right else chance.sample(range(8), 2)
                keys = tuple((block, expert) for expert in dict.fromkeys([*first, *range(4)]))
                at = len(events) - 1  # before the request of the block before
                events[at:at] = [Ranking(keys=keys, active=2), Guess(keys=keys[:1])]
            events.append(Request(block=block, tokens=1, experts=tuple(liked[block]), hits=0))
    return Recording(
        model="made up",
        policy="lru",
        blocks=tuple(Demand(name=f"layers.{n}", experts=8, active=2, size=SIZE) for n in range(3)),
        pool_of=(0, 1, 2),
        pools=(Pooled(slots=4, asked=0, hits=0, predicted=0),) * 3,
        other_bytes=0,
        decode_rate=1.0,
        events=tuple(events),
    )


@pytest.mark.parametrize("policy", REPLAYED)
@pytest.mark.parametrize("predictions", PREDICTIONS)
def test_a_simulation_counts_what_a_replay_counts(policy: str, predictions: str) -> None:
    made = recording()
    told = simulate(made, SLOW, [3, 4, 5], policy, predictions)
    outcomes = [
        replay(made.of_pool(number), slots, policy, predictions=predictions)
        for number, slots in enumerate([3, 4, 5])
    ]
    assert told.asked == sum(one.asked for one in outcomes)
    assert told.hits == sum(one.hits for one in outcomes)
    assert told.predicted == sum(one.predicted for one in outcomes)


@pytest.mark.parametrize("policy", REPLAYED)
def test_a_shared_pool_is_simulated_as_it_is_replayed(policy: str) -> None:
    made = replace(recording(), pools=(Pooled(slots=4, asked=5, hits=2, predicted=1),) * 3)
    shared = made.shared()
    assert shared.pool_of == (0, 0, 0)
    assert shared.pools == (Pooled(slots=12, asked=15, hits=6, predicted=3),)
    told = simulate(shared, SLOW, [12], policy, "top-k")
    outcome = replay(made.events, 12, policy, predictions="top-k")
    assert (told.asked, told.hits, told.predicted) == (
        outcome.asked, outcome.hits, outcome.predicted,
    )  # fmt: skip


def test_blocks_share_with_those_of_their_size() -> None:
    made = recording()
    large = replace(made.blocks[1], size=2 * SIZE)
    shared = replace(made, blocks=(made.blocks[0], large, made.blocks[2])).shared()
    assert shared.pool_of == (0, 1, 0)
    assert [pool.slots for pool in shared.pools] == [8, 4]


def test_on_demand_with_free_compute_takes_what_the_misses_take() -> None:
    told = simulate(recording(), SLOW, [4] * 3, "lru", "none")
    seconds = (told.asked - told.hits) * SIZE / 1e9
    assert told.tokens == 200
    assert told.decode.demand_wait == pytest.approx(seconds)
    assert told.decode.total == pytest.approx(seconds)
    assert told.read_bytes == (told.asked - told.hits) * SIZE


def test_with_every_expert_there_the_model_is_all_that_takes_time() -> None:
    busy = replace(NOTHING, bandwidth=SIZE / 1e-3, launch=2e-4, call=1e-4, layer=3e-4, token=5e-4)
    fast = replace(SLOW, compute=busy, link=LinkSpeed(bandwidth=1e30, stream=1e30, latency=0))
    told = simulate(recording(), fast, [8] * 3, "lru", "none")
    assert told.decode.experts == pytest.approx(200 * 3 * 2 * 1e-3)
    assert told.decode.model == pytest.approx(200 * (5e-4 + 3 * 3e-4))
    assert told.decode.overhead == pytest.approx(200 * 3 * 3e-4, rel=0.02)


def test_good_predictions_are_worth_more_than_none_and_less_than_perfect_ones() -> None:
    busy = replace(SLOW, compute=replace(NOTHING, layer=3e-3))
    made = recording()
    rates = {
        one: simulate(made, busy, [4] * 3, "lru", one).decode_rate
        for one in ("none", GOVERNED, "top-k", "perfect")
    }
    assert rates["none"] < rates[GOVERNED] <= rates["perfect"]
    assert rates["none"] < rates["top-k"] <= rates["perfect"]


def test_the_governor_lets_predictions_be_that_do_not_come_true() -> None:
    made = recording(right=0.0)
    none = simulate(made, SLOW, [3] * 3, "lru", "none")
    governed = simulate(made, SLOW, [3] * 3, "lru", GOVERNED)
    everything = simulate(made, SLOW, [3] * 3, "lru", "top-k")
    assert governed.predicted < 0.1 * everything.predicted
    assert governed.decode.total < 0.5 * (none.decode.total + everything.decode.total)


def test_demands_overtake_predictions_and_share_the_link() -> None:
    link = SimulatedLink(LinkSpeed(bandwidth=4e6, stream=2e6, latency=0))
    alone = link.submit(1_000_000, 1)
    link.wait(alone)
    assert link.now == pytest.approx(0.5)  # one stream alone has half of the link
    predicted = [link.submit(2**20, 1) for _ in range(8)]
    demand = link.submit(2**20, 0)
    link.wait(demand)
    assert [one.done for one in predicted] == [True] * 7 + [False]  # three beside it
    assert link.now == pytest.approx(0.5 + 2 * 4 * 2**20 / 4e6)
    link.cancel(predicted[-1])
    assert link.bandwidth == pytest.approx(link.bytes / link.now)


def test_computing_takes_longer_beside_reads_only() -> None:
    link = SimulatedLink(LinkSpeed(bandwidth=1e6, stream=1e6, latency=0.5))
    link.submit(500_000, 0)  # takes 1 s
    link.compute(1.0, beside=2.0)
    assert link.now == pytest.approx(1.5)
    link.compute(0.001, after=3.0)  # the last read is long over
    assert link.now == pytest.approx(1.501)
    link.wait(link.submit(1, 0))
    before = link.now
    link.compute(0.001, after=3.0)
    assert link.now - before == pytest.approx(0.003)


@pytest.mark.parametrize("name", profiles.names())
def test_profiles_say_where_they_come_from_and_survive_writing(name: str, tmp_path: Path) -> None:
    profile = profiles.read(name)
    assert len(profile.source) > 20
    profiles.write(profile, tmp_path / "again.toml")
    assert profiles.read(str(tmp_path / "again.toml")) == profile


def test_a_profile_that_lacks_something_says_so(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    profiles.write(SLOW, file)
    file.write_text(file.read_text().replace("latency", "lateness"))
    with pytest.raises(OptionError, match="lacks 'latency'"):
        profiles.read(str(file))
    file.write_text(file.read_text().replace("lateness = 0", "latency = -1"))
    with pytest.raises(OptionError, match="latency is -1"):
        profiles.read(str(file))
    with pytest.raises(OptionError, match="rtx4090"):
        profiles.read("nowhere")


def test_no_drafts_take_the_time_of_decoding() -> None:
    made = recording()
    none = simulate_drafts(made, SLOW, [4] * 3, "lru", DRAFT)
    plain = simulate(made, SLOW, [4] * 3, "lru", "none")
    assert (none.tokens, none.passes) == (200, 200)
    assert none.seconds == pytest.approx(plain.decode.total)
    assert none.read_bytes == plain.read_bytes


def test_drafts_that_are_right_hide_reads_behind_computing() -> None:
    made = recording()
    slow = replace(SLOW, compute=replace(NOTHING, layer=0.01))
    none, three = (
        simulate_drafts(made, slow, [8] * 3, "lru", replace(DRAFT, depth=depth)) for depth in (0, 3)
    )
    assert three.passes == three.tokens / 4
    assert three.read_bytes <= none.read_bytes
    assert three.seconds / three.tokens == pytest.approx((3 + 1) / 4 * 3 * 0.01, rel=0.1)


def test_drafts_that_are_wrong_are_read_and_computed_for_nothing() -> None:
    made = recording()
    wrong = replace(DRAFT, depth=3, token=0.0, experts=0.0)
    drafted = simulate_drafts(made, SLOW, [4] * 3, "lru", wrong)
    assert drafted.tokens == drafted.passes
    assert drafted.read_bytes > 2 * simulate_drafts(made, SLOW, [4] * 3, "lru", DRAFT).read_bytes

"""The depth of drafts: the best of those that pay, and a small price for finding out."""

import random
from dataclasses import dataclass

import pytest

from moecc.runtime.depth import SHARE, Depth, rate


@dataclass(kw_only=True)
class Machine:
    """What drafts cost and how often they are right."""

    chance: float
    draft: float = 0.2
    base: float = 1.0
    slope: float = 0.1

    def verify(self, tokens: int) -> float:
        return self.base + self.slope * (tokens - 1)

    def best(self, most: int) -> float:
        return max(
            rate([self.chance] * depth, self.draft, self.verify(depth + 1))
            for depth in range(most + 1)
        )

    def run(self, depth: Depth, tokens: int, dice: random.Random) -> float:
        """Generate with a governor; give tokens a second."""
        given, seconds = 0, 0.0
        while given < tokens:
            drafted = depth.choose(100)
            accepted = 0
            while accepted < drafted and dice.random() < self.chance:
                accepted += 1
            times = drafted * self.draft, self.verify(drafted + 1)
            depth.observe(drafted, accepted, *times)
            given += accepted + 1
            seconds += sum(times)
        return given / seconds


def test_rate_is_tokens_over_seconds() -> None:
    assert rate([], 5.0, 2.0) == 0.5
    assert rate([0.5, 0.5], 1.0, 2.0) == pytest.approx(1.75 / 4)


@pytest.mark.parametrize("chance", [0.95, 0.8, 0.5, 0.2])
def test_it_comes_within_a_twentieth_of_the_best_depth(chance: float) -> None:
    machine, depth = Machine(chance=chance), Depth()
    machine.run(depth, 300, random.Random(1))
    reached = machine.run(depth, 3000, random.Random(2))
    assert reached > 0.95 * machine.best(8)


@pytest.mark.parametrize("chance", [0.0, 0.05])
def test_drafts_that_do_not_pay_cost_a_small_share_of_the_time(chance: float) -> None:
    machine, depth = Machine(chance=chance, draft=0.5, slope=0.5), Depth()
    machine.run(depth, 300, random.Random(1))
    reached = machine.run(depth, 3000, random.Random(2))
    assert depth.current == 0
    assert reached > (1 - 1.5 * SHARE) * machine.best(8)


def test_it_recovers_when_the_text_changes() -> None:
    depth, dice = Depth(), random.Random(3)
    hard, easy = Machine(chance=0.05), Machine(chance=0.95)
    hard.run(depth, 1000, dice)
    assert depth.current == 0
    easy.run(depth, 1000, dice)
    assert depth.current >= 5
    hard.run(depth, 300, dice)
    assert depth.current == 0


def test_a_pass_that_compiled_something_is_not_held_against_a_depth() -> None:
    depth = Depth()
    depth.observe(0, 0, 0.0, 60.0)
    depth.observe(0, 0, 0.0, 1.0)
    assert depth.verify_seconds(1) == 1.0


def test_passes_that_were_never_seen_lie_on_a_line() -> None:
    depth = Depth(verify={1: 1.0, 3: 2.0})
    assert [depth.verify_seconds(tokens) for tokens in (1, 2, 3, 5)] == [1.0, 1.5, 2.0, 3.0]


def test_it_drafts_no_more_than_is_left() -> None:
    depth = Depth(verify={1: 1.0, 3: 1.0}, chances=[1.0], draft=0.0)
    assert depth.choose(0) == 0
    assert depth.choose(1) <= 1


@pytest.mark.parametrize("tokens", [50, 200, 1000])
def test_even_the_first_text_loses_no_more_than_three_hundredths(tokens: int) -> None:
    machine = Machine(chance=0.0, draft=1.0, slope=1.0)
    assert machine.run(Depth(), tokens, random.Random(1)) > 0.97 * machine.best(0)

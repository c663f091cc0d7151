"""Guesses that do not pay in time are left, and taken up again when they do."""

import pytest

from moecc.runtime.offload.simulate import GOVERNED, simulate
from moecc.runtime.offload.trial import Trial
from tests.runtime.offload.test_simulate import SLOW, recording


class World:
    """Decoding steps that take as long as is said, with guesses and without."""

    def __init__(self) -> None:
        self.now = 0.0
        self.trial = Trial(clock=lambda: self.now)

    def steps(self, count: int, *, guessing: float, not_guessing: float) -> float:
        began = self.now
        for _ in range(count):
            self.trial.begin(1)
            self.now += guessing if self.trial.on else not_guessing
        return self.now - began


@pytest.mark.parametrize(("guessing", "not_guessing"), [(1.3, 1.0), (1.0, 1.3), (1.0, 1.0)])
def test_steps_take_hardly_longer_than_on_the_better_side(
    guessing: float, not_guessing: float
) -> None:
    world = World()
    took = world.steps(2000, guessing=guessing, not_guessing=not_guessing)
    assert took < 2000 * 1.03


def test_a_world_that_changes_is_noticed() -> None:
    world = World()
    world.steps(2000, guessing=1.3, not_guessing=1.0)
    assert not world.trial.on
    world.steps(600, guessing=1.0, not_guessing=1.3)
    assert world.steps(1000, guessing=1.0, not_guessing=1.3) < 1000 * 1.03


def test_what_goes_on_between_two_texts_is_not_counted() -> None:
    world = World()
    for _ in range(30):
        world.trial.begin(500)
        world.now += 100.0 if world.trial.on else 0.0  # reading a prompt
        world.steps(10, guessing=1.0, not_guessing=2.0)
    assert world.trial.seconds == {True: 1.0, False: 2.0}


def test_a_moment_of_something_else_does_not_decide() -> None:
    world = World()
    world.steps(3, guessing=1.0, not_guessing=1.2)
    world.now += 50.0
    world.steps(40, guessing=1.0, not_guessing=1.2)
    assert world.trial.on


@pytest.mark.parametrize("right", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_governed_guesses_cost_little_where_the_link_is_all_that_counts(right: float) -> None:
    made = recording(tokens=1500, right=right)
    without = simulate(made, SLOW, [3] * 3, "lru", "none").decode.total
    assert simulate(made, SLOW, [3] * 3, "lru", GOVERNED).decode.total < 1.03 * without


def test_drafts_and_their_verification_are_no_steps() -> None:
    world = World()
    for _ in range(200):
        world.steps(1, guessing=1.0, not_guessing=1.3)
        world.now += 50.0  # a draft
        world.trial.begin(4, foreseen=True)
        world.now += 50.0
    assert world.trial.seconds == {}
    world.steps(200, guessing=1.0, not_guessing=1.3)
    assert world.trial.seconds == {True: pytest.approx(1.0), False: pytest.approx(1.3)}

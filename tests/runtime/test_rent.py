"""Copies of experts come when time has paid for them, and go when drafts with them lose."""

import random
from dataclasses import dataclass, field

import pytest

from moecc.runtime.depth import Depth
from moecc.runtime.rent import Rent
from tests.runtime.test_depth import Machine


@dataclass(kw_only=True)
class Engine:
    """Decodes in made-up time, as the loop of `moecc.speculate` does."""

    drafts: Machine
    """With copies; it decodes a token in `drafts.base` without drafting."""
    plain: float = 1.0
    """Seconds of a token without copies."""
    making: float = 40.0
    depth: Depth = field(default_factory=Depth)
    rent: Rent = field(default_factory=lambda: Rent(price=50.0))
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    def run(self, tokens: int) -> float:
        """Give the seconds that so many tokens take."""
        rent, given, total = self.rent, 0, 0.0
        while given < tokens:
            if rent.held and not rent.pays(self.depth.best_rate()):
                rent.held = False
            elif rent.is_affordable():
                rent.take(self.making)
                self.depth.credit += rent.price
                total += self.making
            k = self.depth.choose(8) if rent.held else 0
            right = 0
            while right < k and self.dice.random() < self.drafts.chance:
                right += 1
            draft = k * self.drafts.draft
            verify = self.drafts.verify(k + 1) if rent.held else self.plain
            rent.observe(right + 1, draft + verify)
            if rent.held:
                self.depth.observe(k, right, draft, verify)
            given += right + 1
            total += draft + verify
        return total


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("tokens", [100, 3_000, 30_000])
def test_copies_that_lose_cost_no_more_than_three_hundredths(chance: float, tokens: int) -> None:
    engine = Engine(drafts=Machine(chance=chance, draft=0.6, base=2.0, slope=0.5))
    assert engine.run(tokens) < 1.03 * tokens
    assert (engine.rent.tries > 0) == (tokens > 5_000)
    assert engine.run(tokens) < 1.03 * tokens


def test_copies_that_pay_come_and_stay() -> None:
    engine = Engine(drafts=Machine(chance=0.9, base=1.2))
    engine.run(6_000)
    assert (engine.rent.held, engine.rent.tries) == (True, 1)
    reached = 3_000 / engine.run(3_000)
    assert reached > 0.95 * engine.drafts.best(8) > 1.5 / engine.plain


def test_they_go_when_the_text_changes_and_come_back() -> None:
    engine = Engine(drafts=Machine(chance=0.9, base=1.2))
    engine.run(6_000)
    engine.drafts = Machine(chance=0.1, base=1.2)
    assert engine.run(6_000) < 1.05 * 6_000
    assert not engine.rent.held
    engine.drafts = Machine(chance=0.9, base=1.2)
    engine.run(12_000)
    assert engine.rent.held


def test_nothing_is_made_before_a_token_was_timed() -> None:
    rent = Rent(price=0.0)
    assert not rent.is_affordable()
    rent.observe(1, 1.0)
    assert rent.is_affordable()

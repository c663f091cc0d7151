"""Decide when low-bit copies are worth the slots that a cache of experts gives up for them.

No depth of drafts gives those slots back, so drafts have to be faster than decoding without copies,
not than drafting nothing with them. What trying costs is kept in an account: a small share of all
time goes in; making copies goes out, and what tokens take beyond what they took without copies.
Copies are made when the account holds their price twice, once for themselves and once for drafts
that turn out to lose, and go when they lose by the measured rates, or the account is empty. So
being wrong costs no more than that share, and one cycle.
"""

from dataclasses import dataclass

from moecc.runtime.depth import SHARE, mix

_TRY = 24
"""Cycles before rates are believed: the depth is being found meanwhile."""


@dataclass(slots=True, kw_only=True)
class Rent:
    """The account of one model's copies; times in seconds."""

    price: float
    """To make them, and to fill their slots with experts again."""
    held: bool = False
    """They are there."""
    plain: float | None = None
    """A token without them."""
    credit: float = 0.0
    tries: int = 0
    """How often they were made."""
    _cycles: int = 0
    """Since they were made."""

    def observe(self, tokens: int, seconds: float) -> None:
        """Take note of a cycle."""
        self.credit += SHARE * seconds
        if not self.held:
            self.plain = mix(self.plain, seconds / tokens)
        elif self.plain is not None:
            self._cycles += 1
            saved = self.credit + tokens * self.plain - seconds
            self.credit = min(saved, 2 * self.price)  # old gains pay for no new losses

    def is_affordable(self) -> bool:
        """Tell whether copies may be made."""
        return not self.held and self.plain is not None and self.credit >= 2 * self.price

    def take(self, seconds: float) -> None:
        """Have copies, which took so long to make."""
        self.price = max(self.price, seconds)
        self.credit -= self.price
        self.held, self._cycles = True, 0
        self.tries += 1

    def pays(self, rate: float) -> bool:
        """Tell whether copies may stay, with which drafts give so many tokens a second."""
        if self.plain is None or self.credit < 0:
            return False
        return self._cycles < _TRY or rate * self.plain > 1

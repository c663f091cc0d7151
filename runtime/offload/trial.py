"""Try whether guesses pay, by the time of whole decoding steps with and without them.

A governor's prices know the link. They do not know what a read costs whatever else runs on the same
cores and memory. So steps take turns: a few with guesses, a few without, many with what was faster,
and then a few with the other again. The many become more while the same side wins, so that trying
costs a small share (`TRY / MOST`) of what the wrong side loses.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

TRY = 16
"""Steps of a short turn. The first of any turn is not counted: the turn before filled the cache."""
LEAST, MOST = {True: 128, False: 32}, {True: 512, False: 256}
"""Steps of a long one. Guesses are soon tried again: a busy disk may have spoken against them."""
MARGIN = 1.02
"""How much longer steps with guesses may seem to take: two means of 16 differ by chance."""
MOST_TOKENS = 8
"""Tokens of a call for which guesses are made: decoding, or checking a few drafted tokens."""


@dataclass(slots=True)
class Trial:
    """Whether the blocks of a model act on guesses now, and what steps took."""

    clock: Callable[[], float] = time.perf_counter
    """Seconds; a simulator has its own."""
    on: bool = True
    waited: float = 0.0
    """Seconds in which blocks waited for experts: the link was busy with what they asked for."""
    seconds: dict[bool, float] = field(default_factory=dict[bool, float])
    """Of a step with guesses (True) and without: what the latest turn had counts half."""
    _best: bool | None = None
    _left: int = TRY
    _is_long: bool = False
    _stay: int = 0
    _began: float | None = None
    _taken: list[float] = field(default_factory=list[float])

    def begin(self, tokens: int, *, foreseen: bool = False) -> None:
        """Begin a pass through the model.

        One of more than `MOST_TOKENS` is no decoding step, nor is what a draft foresaw or took.
        """
        if tokens > MOST_TOKENS or foreseen:
            self._began = None
            return
        now = self.clock()
        if self._began is not None:
            self._taken.append(now - self._began)
        self._began = now
        if len(self._taken) == self._left:
            self._end_turn()

    def _end_turn(self) -> None:
        mean = statistics.fmean(sorted(self._taken[1:])[:-1])  # the longest may be something else
        self._taken.clear()
        self.seconds[self.on] = (self.seconds.get(self.on, mean) + mean) / 2
        if self._is_long or len(self.seconds) == 1:
            self.on, self._left, self._is_long = not self.on, TRY, False
            return
        best = self.seconds[True] <= MARGIN * self.seconds[False]
        self._stay = min(2 * self._stay, MOST[best]) if best is self._best else LEAST[best]
        self._best = best
        self.on, self._left, self._is_long = best, self._stay, True

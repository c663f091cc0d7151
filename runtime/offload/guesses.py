"""Act on predictions of one block's experts, and check them against what was asked for."""

import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field

from moecc.runtime.offload.governor import Governor
from moecc.runtime.offload.policy import Key
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.store import Store
from moecc.runtime.offload.trial import Trial

_SOON = 8
"""Requests within which an expert that a guess drove out is missed or not."""


@dataclass(slots=True)
class Guesses:
    """The latest guess of a block and what guesses have been worth."""

    governor: Governor = field(default_factory=Governor)
    trial: Trial = field(default_factory=Trial)
    """Of the whole model."""
    right: int = 0
    """Of the top-k experts asked for, those that were among the first k guessed."""
    wide: int = 0
    """Of these, those that were among all that were guessed."""
    asked: int = 0
    whole: int = 0
    """Requests whose experts were all among the first k guessed."""
    made: int = 0
    clock: Callable[[], float] = time.perf_counter
    """Seconds; a simulator has its own."""
    _latest: tuple[list[int], set[int], float] | None = None
    """What it ranked, what of that was absent, and when."""
    _driven_out: dict[Key, int] = field(default_factory=dict[Key, int])

    def make(self, ranked: Sequence[Key], active: int, pool: Pool, store: Store) -> None:
        """Take a guess, best first, and start those reads that are worth it."""
        pool.trace.add_ranking(tuple(ranked), active)
        read = store.layout.size / (pool.link.bandwidth or _FAST)
        chosen = self.choose(ranked, active, pool.cache, read, pool.link.busy())
        if chosen:
            self.drove_out(pool.predict(store, chosen, 1, len(chosen)))

    def choose(
        self, ranked: Sequence[Key], active: int, cached: Container[Key], read: float, busy: float
    ) -> list[Key]:
        """Take a guess, best first, and say what is worth a read of so many seconds.

        Of what is cached, the first `active` are named, too: nothing drives them out.
        """
        absent = {expert for block, expert in ranked if (block, expert) not in cached}
        self._latest = [expert for _, expert in ranked], absent, self._computed()
        if not self.trial.on:
            return []
        worth = self.governor.worth(len(ranked), read, busy)
        return [
            key
            for rank, (key, good) in enumerate(zip(ranked, worth, strict=True))
            if (good if key[1] in absent else rank < active)
        ]

    def drove_out(self, keys: Iterable[Key]) -> None:
        """Watch whether experts that left for guesses are missed soon."""
        self._driven_out.update(dict.fromkeys(keys, _SOON))

    def check(self, wanted: Iterable[int], missing: Iterable[Key]) -> None:
        """Compare the latest guess with the experts that a request names."""
        self._count_driven_out(set(missing))
        if self._latest is None:
            return
        (ranked, absent, at), self._latest = self._latest, None
        named = set(wanted)
        came_true = [expert in named for expert in ranked]
        news = [
            true if expert in absent else None
            for expert, true in zip(ranked, came_true, strict=True)
        ]
        self.governor.observe(news, self._computed() - at)
        first = sum(came_true[: len(named)])
        self.made += 1
        self.asked += len(named)
        self.right += first
        self.wide += sum(came_true)
        self.whole += first == len(named)

    def _computed(self) -> float:
        """Give the time, were there no waiting: guesses are read in what is left."""
        return self.clock() - self.trial.waited

    def _count_driven_out(self, missing: set[Key]) -> None:
        for key in list(self._driven_out):
            self._driven_out[key] -= 1
            if key in missing or not self._driven_out[key]:
                del self._driven_out[key]
                self.governor.driven_out(key in missing)


_FAST = 1e9
"""Bytes a second, assumed until something was read."""

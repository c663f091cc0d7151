"""Decide which expert leaves when another one needs its slot: pure functions of ids and counters.

A policy gives each cached expert a score; of those that nobody is using, the lowest leaves.

    lru         the one that was not used for longest
    lfu         the one that was used least often, where uses fade with each request of its block,
                and are remembered of experts that left; one that a prediction names goes last
    lookahead   one that no prediction names, least often used first; else the one predicted to be
                used last (Belady's rule over the predicted future)
    belady      the one that will be used last: for replays, where the future is known
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Key = tuple[int, int]
"""A block's number and an expert's."""

FADE = 0.97
"""What a use counts after a request of the same block: half after 23 (`docs/decisions/0025`)."""


@dataclass(slots=True)
class Usage:
    """What policies go by; steps count requests."""

    last: dict[Key, int] = field(default_factory=dict[Key, int])
    """The step of the latest use."""
    asked: Counter[int] = field(default_factory=Counter[int])
    """Requests of each block."""
    uses: dict[Key, tuple[float, int]] = field(default_factory=dict[Key, tuple[float, int]])
    """The faded number of uses, and its block's requests at the latest one."""
    due: dict[Key, int] = field(default_factory=dict[Key, int])
    """The step for which it is predicted; of the past when the prediction was wrong."""

    def use(self, keys: Iterable[Key], step: int) -> None:
        """Count a request's experts."""
        keys = list(keys)
        self.asked.update({block for block, _ in keys})
        for key in keys:
            self.last[key] = step
            self.uses[key] = self.often(key) + 1.0, self.asked[key[0]]

    def often(self, key: Key) -> float:
        """Give the number of uses, as faded as they are now."""
        uses, at = self.uses.get(key, (0.0, 0))
        return uses * FADE ** (self.asked[key[0]] - at)


Policy = Callable[[Key, Usage, int], tuple[float, ...]]
"""Score an expert at a step: `policy(key, usage, step)`."""

_NEVER = float("inf")


def lru(key: Key, usage: Usage, step: int) -> tuple[float, ...]:
    """Score by the latest use."""
    return (usage.last.get(key, -1),)


def lfu(key: Key, usage: Usage, step: int) -> tuple[float, ...]:
    """Score by the faded number of uses, then by the latest."""
    foretold = usage.due.get(key, -1) > step  # without, what a guess let in would be first to go
    return foretold, usage.often(key), usage.last.get(key, -1)


def lookahead(key: Key, usage: Usage, step: int) -> tuple[float, ...]:
    """Score by the predicted next use, then as `lfu` does."""
    due = usage.due.get(key, -1)
    next_use = due - step if due > step else _NEVER  # at `step` itself, what it needs is pinned
    return (-next_use, *lfu(key, usage, step))


def belady(future: Mapping[Key, list[int]]) -> Policy:
    """Score by the true next use; `future` lists the steps of every use, latest first."""

    def score(key: Key, usage: Usage, step: int) -> tuple[float, ...]:
        uses = future.get(key, [])
        while uses and uses[-1] <= step:  # at `step` itself, what it needs is pinned
            uses.pop()
        return (-(uses[-1] if uses else _NEVER),)

    return score


POLICIES: Mapping[str, Policy] = {"lru": lru, "lfu": lfu, "lookahead": lookahead}
"""What the option `policy` names."""
AUTO = "lfu"
"""What its `auto` is: `python -m benchmarks.routing` compares hits."""

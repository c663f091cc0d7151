"""Decide which expert leaves when another one needs its slot: pure functions of ids and counters.

A policy gives each cached expert a score; of those that nobody is using, the lowest leaves.

    lru         the one that was not used for longest
    lfu         the one that was used least often since it came; a prediction counts as a use
    lookahead   one that no prediction names, least recently used first; else the one predicted to
                be used last (Belady's rule over the predicted future)
    belady      the one that will be used last: for replays, where the future is known
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Key = tuple[int, int]
"""A block's number and an expert's."""


@dataclass(slots=True)
class Usage:
    """What policies go by; steps count requests."""

    last: dict[Key, int] = field(default_factory=dict[Key, int])
    """The step of the latest use."""
    count: dict[Key, int] = field(default_factory=dict[Key, int])
    """Uses since it came into the cache."""
    due: dict[Key, int] = field(default_factory=dict[Key, int])
    """The step for which it is predicted; of the past when the prediction was wrong."""


Policy = Callable[[Key, Usage, int], tuple[float, ...]]
"""Score an expert at a step: `policy(key, usage, step)`."""

_NEVER = float("inf")


def lru(key: Key, usage: Usage, step: int) -> tuple[float, ...]:
    """Score by the latest use."""
    return (usage.last.get(key, -1),)


def lfu(key: Key, usage: Usage, step: int) -> tuple[float, ...]:
    """Score by the number of uses, then by the latest."""
    foretold = usage.due.get(key, -1) > step  # without, what a guess let in would be first to go
    return (usage.count.get(key, 0) + foretold, usage.last.get(key, -1))


def lookahead(key: Key, usage: Usage, step: int) -> tuple[float, ...]:
    """Score by the predicted next use."""
    due = usage.due.get(key, -1)
    next_use = due - step if due > step else _NEVER  # at `step` itself, what it needs is pinned
    return (-next_use, usage.last.get(key, -1))


def belady(future: Mapping[Key, list[int]]) -> Policy:
    """Score by the true next use; `future` lists the steps of every use, latest first."""

    def score(key: Key, usage: Usage, step: int) -> tuple[float, ...]:
        uses = future.get(key, [])
        while uses and uses[-1] <= step:  # at `step` itself, what it needs is pinned
            uses.pop()
        return (-(uses[-1] if uses else _NEVER),)

    return score


POLICIES: Mapping[str, Policy] = {"lru": lru, "lfu": lfu, "lookahead": lookahead}
"""What the option `policy` names; `auto` is chosen by `schedule_offload`."""

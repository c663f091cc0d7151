"""Run a recorded trace through a cache of any size and policy, without a model or a disk.

Replaying a run's own trace with its own slots and policy gives exactly its hits and misses: the
cache goes by the order of events alone, and predictions are recorded with what they let in. For
other sizes and policies predictions are left out, since other experts would have been let in.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from moecc.runtime.offload.cache import Cache
from moecc.runtime.offload.policy import POLICIES, Key, Policy, belady
from moecc.runtime.offload.trace import Event, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a cache would have done."""

    policy: str
    slots: int
    """Of each block."""
    asked: int
    hits: int

    @property
    def misses(self) -> int:
        """Experts that would have been read."""
        return self.asked - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits over experts asked for; 1 for an empty trace."""
        return self.hits / self.asked if self.asked else 1.0


def replay(
    events: Sequence[Event], slots: int, policy: str, *, predictions: bool = False
) -> Outcome:
    """Replay the events of one pool; `policy` may be `belady`, which knows the future.

    Raises `KeyError` for an unknown policy.
    """
    requests = [event for event in events if isinstance(event, Request)]
    cache = Cache(slots, _policy(policy, requests, slots))
    hits = 0
    for event in events:
        if isinstance(event, Request):
            hits += _request(cache, event)
        elif predictions:
            cache.predict(event.keys, cache.step + 1, len(event.keys))
    asked = sum(len(request.experts) for request in requests)
    return Outcome(policy=policy, slots=slots, asked=asked, hits=hits)


def groups_of(experts: Sequence[int], slots: int) -> list[list[int]]:
    """Split a request that needs more experts than there are slots, as a bank does.

    Two groups, one that is computed and one that is read, take half of the slots; what is in the
    others stays until its turn comes.
    """
    size = slots if len(experts) <= slots else max(1, slots // 4)
    return [list(experts[i : i + size]) for i in range(0, len(experts), size)]


def _request(cache: Cache, request: Request) -> int:
    """Ask for a request's experts in the order of `Bank.run`; count hits."""
    groups = groups_of(request.experts, cache.slots)
    double = len(groups) > 1 and 2 * len(groups[0]) <= cache.slots
    hits = 0
    held: list[list[Key]] = []
    for number, group in enumerate(groups):
        if held and not double:
            cache.release(held.pop(0))
        keys = [(request.block, expert) for expert in group]
        then = [(request.block, expert) for later in groups[number + 1 :] for expert in later]
        hits += sum(one.hit for one in cache.request(keys, then))
        held.append(keys)
        if len(held) > 1:
            cache.release(held.pop(0))
    for keys in held:
        cache.release(keys)
    return hits


def _policy(name: str, requests: Sequence[Request], slots: int) -> Policy:
    if name != "belady":
        return POLICIES[name]
    future: dict[Key, list[int]] = defaultdict(list)
    step = 0
    for request in requests:
        for group in groups_of(request.experts, slots):
            step += 1
            for expert in group:
                future[request.block, expert].append(step)
    return belady({key: steps[::-1] for key, steps in future.items()})

"""Run a recorded trace through caches of any size and policy, without a model or a disk.

Replaying a run's own trace with its own slots, policy and predictions gives exactly its hits and
misses: a cache goes by the order of events alone, and what predictions let in is recorded. Other
settings are replayed with one of these predictions:

    none       every expert is read when it is asked for
    recorded   what the run's predictions let in
    top-k      the first K of every prediction of the run, which a governor may have held back
    perfect    each request is known when the one before it ends: a bound
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moecc.runtime.offload.cache import Admission, Cache
from moecc.runtime.offload.policy import POLICIES, Key, Policy, belady
from moecc.runtime.offload.recording import block_of
from moecc.runtime.offload.trace import Event, Guess, Ranking, Request

REPLAYED = (*POLICIES, "belady")
"""Policies; `belady` knows the future."""
PREDICTIONS = ("none", "recorded", "top-k", "perfect")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a cache would have done."""

    policy: str
    slots: int
    """Of each block."""
    asked: int
    hits: int
    predicted: int = 0
    """Loads that predictions started."""

    @property
    def misses(self) -> int:
        """Experts that would have been read while somebody waits."""
        return self.asked - self.hits

    @property
    def loads(self) -> int:
        """Experts that would have been read at all."""
        return self.misses + self.predicted

    @property
    def hit_rate(self) -> float:
        """Hits over experts asked for; 1 for an empty trace."""
        return self.hits / self.asked if self.asked else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What one event did to a cache."""

    event: Event
    hits: int
    predicted: int
    """Loads that a prediction started."""


def replay(
    events: Sequence[Event], slots: int, policy: str, *, predictions: str = "none"
) -> Outcome:
    """Replay the events of one pool.

    Raises `KeyError` for a policy that is not in `REPLAYED`.
    """
    asked = hits = predicted = 0
    for one in play(events, slots, policy, predictions=predictions):
        asked += len(one.event.experts) if isinstance(one.event, Request) else 0
        hits += one.hits
        predicted += one.predicted
    return Outcome(policy=policy, slots=slots, asked=asked, hits=hits, predicted=predicted)


def play(
    events: Sequence[Event], slots: int, policy: str, *, predictions: str = "none"
) -> Iterator[Played]:
    """Replay the events of one pool, and tell of each what it did."""
    requests = [event for event in events if isinstance(event, Request)]
    cache = Cache(slots, new_policy(policy, requests, slots))
    blocks = sorted(set(map(block_of, events)))
    latest = max(blocks, default=0)
    coming = iter(requests)

    def foresee() -> int:
        following = next(coming, None) if predictions == "perfect" else None
        return len(let_in(cache, first_keys(following, slots))) if following else 0

    early = foresee()
    for event in events:
        hits, predicted = 0, early
        early = 0
        if isinstance(event, Request):
            latest = event.block
            for admitted in serve(cache, event):
                hits += sum(one.hit for one in admitted)
            predicted += foresee()
        else:
            keys = foretold(event, predictions)
            predicted += len(let_in(cache, keys, turns_until(keys, latest, blocks)))
        yield Played(event=event, hits=hits, predicted=predicted)


def groups_of(experts: Sequence[int], slots: int) -> list[list[int]]:
    """Split a request that needs more experts than there are slots, as a bank does.

    Two groups, one that is computed and one that is read, take half of the slots; what is in the
    others stays until its turn comes.
    """
    size = slots if len(experts) <= slots else max(1, slots // 4)
    return [list(experts[i : i + size]) for i in range(0, len(experts), size)]


def serve(
    cache: Cache, request: Request, submit: Callable[[list[Admission]], None] | None = None
) -> Iterator[list[Admission]]:
    """Ask for a request's experts as `Bank.run` does; gives each group when it is computed.

    `submit` is told of experts as they are admitted, which may be a group ahead.
    """

    def ask(number: int) -> list[Admission]:
        if number >= len(groups):
            return []
        keys, *then = [[(request.block, one) for one in group] for group in groups[number:]]
        admitted = cache.request(keys, [key for group in then for key in group])
        if submit is not None:
            submit(admitted)
        return admitted

    cache.withdraw(request.block, request.experts)
    groups = groups_of(request.experts, cache.slots)
    double = len(groups) > 1 and 2 * len(groups[0]) <= cache.slots
    ahead = ask(0)
    for number in range(len(groups)):
        current = ahead
        if double:
            ahead = ask(number + 1)
        yield current
        cache.release(one.key for one in current)
        if not double:
            ahead = ask(number + 1)


def foretold(event: Guess | Ranking, predictions: str) -> Sequence[Key]:
    """Say which experts an event of a run would let in, under the predictions of a replay."""
    if isinstance(event, Ranking):
        return event.keys[: event.active] if predictions == "top-k" else ()
    return event.keys if predictions == "recorded" else ()


def first_keys(request: Request, slots: int) -> list[Key]:
    """List what a request asks for at first."""
    groups = groups_of(request.experts, slots)
    return [(request.block, expert) for expert in groups[0]] if groups else []


def let_in(cache: Cache, keys: Sequence[Key], turns: int = 1) -> list[Admission]:
    """Admit experts that are predicted for a request so many turns ahead."""
    return cache.predict(keys, cache.step + turns, len(keys))


def turns_until(keys: Sequence[Key], latest: int, blocks: Sequence[int]) -> int:
    """Count requests of a pool up to the one that predictions are for: its blocks take turns.

    `latest` is the block that asked last, `blocks` are those of the pool, ascending.
    """
    if not keys:
        return 1
    return (blocks.index(keys[0][0]) - blocks.index(latest)) % len(blocks) or len(blocks)


def new_policy(name: str, requests: Sequence[Request], slots: int) -> Policy:
    """Make a policy; Belady's is told the future."""
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

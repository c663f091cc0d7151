"""Tell how long a recorded run would take: with other caches, and on other hardware.

A discrete-event simulation on two resources, the link and whatever computes. Cache, policies,
guesses and their governor are the engine's own; only time is made up, from a `Profile`:

    token ─ layer ─ guesses ─ ask ─ [wait] compute the experts that are there ─ ... ─ layer ─ ...
                        └ loads ─┴─▶ link: chunks by priority

The experts of a block that are there compute while the others arrive, as in `Bank.run`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Literal

from moecc.runtime.offload.cache import Admission, Cache
from moecc.runtime.offload.guesses import Guesses
from moecc.runtime.offload.load import DEMAND
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.policy import Key
from moecc.runtime.offload.profile import Profile
from moecc.runtime.offload.recording import Recording, block_of
from moecc.runtime.offload.replay import (
    first_keys,
    foretold,
    let_in,
    new_policy,
    serve,
    turns_until,
)
from moecc.runtime.offload.simulated_link import SimulatedLink, Transfer
from moecc.runtime.offload.trace import Guess, Ranking, Request
from moecc.runtime.offload.trial import MOST_TOKENS, Trial

GOVERNED = "governed"
"""Predictions that the run made, let in as a governor decides with the profile's speeds."""
Part = Literal["experts", "model", "overhead", "demand_wait", "prefetch_wait"]


@dataclass(slots=True, kw_only=True)
class Times:
    """Where the time went, in seconds."""

    experts: float = 0.0
    """Kernels of experts."""
    model: float = 0.0
    """Everything beside the blocks."""
    overhead: float = 0.0
    """Calls of banks and launches."""
    demand_wait: float = 0.0
    """For experts that nobody foresaw."""
    prefetch_wait: float = 0.0
    """For experts that were on their way."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())

    def add(self, part: Part, seconds: float) -> None:
        """Count time."""
        setattr(self, part, getattr(self, part) + seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A run in simulated time."""

    tokens: int
    """Decoding steps."""
    decode: Times
    prefill: Times
    asked: int
    hits: int
    predicted: int
    """Loads that predictions started."""
    read_bytes: int

    @property
    def decode_rate(self) -> float:
        """Decoding steps a second."""
        return self.tokens / self.decode.total if self.tokens else 0.0


def simulate(
    recording: Recording,
    profile: Profile,
    slots: Sequence[int],
    policy: str,
    predictions: str = GOVERNED,
) -> Simulated:
    """Run a recording with so many slots in each pool.

    `predictions` are those of a replay, or `GOVERNED`.
    """
    return Run(recording, profile, slots, policy, predictions).finish()


@dataclass(slots=True)
class _Pool:
    cache: Cache
    coming: Iterator[Request]
    blocks: list[int]
    latest: int
    """Of its blocks, the one that asked last."""
    loads: dict[Key, Transfer] = field(default_factory=dict[Key, Transfer])


class Run:
    """What a simulation changes as it goes."""

    def __init__(
        self,
        recording: Recording,
        profile: Profile,
        slots: Sequence[int],
        policy: str,
        predictions: str,
    ) -> None:
        self.recording, self.predictions = recording, predictions
        self.link, self.speed = SimulatedLink(profile.link), profile.compute
        clock = partial(getattr, self.link, "now")
        self.trial = Trial(clock=clock)
        self.guesses = [Guesses(clock=clock, trial=self.trial) for _ in recording.blocks]
        self.pools: list[_Pool] = []
        for number, count in enumerate(slots):
            own = [one for one in recording.of_pool(number) if isinstance(one, Request)]
            cache = Cache(count, new_policy(policy, own, count))
            blocks = [block for block, pool in enumerate(recording.pool_of) if pool == number]
            pool = _Pool(cache=cache, coming=iter(own), blocks=blocks, latest=blocks[-1])
            self.pools.append(pool)
        self.times = {False: Times(), True: Times()}
        """Of prefills, and of decoding."""
        self.now = self.times[False]
        self.asked = self.hits = self.predicted = 0

    def finish(self) -> Simulated:
        """Go through the whole recording."""
        for number in range(len(self.pools)):
            self._foresee(number)
        tokens, last = 0, len(self.recording.blocks)
        for before, request in _calls(self.recording):
            decoding = request.tokens <= MOST_TOKENS
            self.now = self.times[decoding]
            if request.block <= last:
                tokens += decoding
                self.compute("model", self.speed.token)
            last = request.block
            others = self.recording.other_bytes / len(self.recording.blocks)
            read = others / self.speed.bandwidth * max(1.0, request.tokens / self.speed.balance)
            recalled = [event for event in before if block_of(event) == request.block]
            for event in recalled:  # what tokens chose before, as soon as they are known
                self._guess(event)
            self.compute("model", self.speed.layer + read)
            for event in before:
                if event not in recalled:
                    self._guess(event)
            self.serve(request)
            self._foresee(self.recording.pool_of[request.block])
        return Simulated(
            tokens=tokens,
            decode=self.times[True],
            prefill=self.times[False],
            asked=self.asked,
            hits=self.hits,
            predicted=self.predicted,
            read_bytes=self.link.bytes,
        )

    def _pool(self, block: int) -> _Pool:
        return self.pools[self.recording.pool_of[block]]

    def compute(self, part: Part, seconds: float) -> None:
        """Compute for so long, were nothing read meanwhile."""
        start = self.link.now
        beside = self.speed.beside_reads
        after = self.speed.after_reads if part == "model" else beside
        self.link.compute(seconds, beside, after)
        self.now.add(part, self.link.now - start)

    def _guess(self, event: Guess | Ranking) -> None:
        block = block_of(event)
        if self.predictions != GOVERNED:
            self.let_in(block, foretold(event, self.predictions))
        elif isinstance(event, Ranking):
            guesses, size = self.guesses[block], self.recording.blocks[block].size
            read = size / (self.link.bandwidth or self.link.speed.bandwidth)
            cached, busy = self._pool(block).cache, self.link.busy()
            chosen = guesses.choose(event.keys, event.active, cached, read, busy)
            guesses.drove_out(self.let_in(block, chosen))

    def _foresee(self, number: int) -> None:
        """Let in what a pool is asked for next, if predictions are perfect."""
        pool = self.pools[number]
        following = next(pool.coming, None) if self.predictions == "perfect" else None
        if following is not None:
            self.let_in(following.block, first_keys(following, pool.cache.slots))

    def let_in(self, block: int, keys: Sequence[Key], priority: int = DEMAND + 1) -> list[Key]:
        """Start reading what is predicted for a block; give what had to go for it."""
        pool = self._pool(block)
        turns = turns_until(keys, pool.latest, pool.blocks)
        admitted = let_in(pool.cache, keys, turns)
        self.predicted += len(admitted)
        self._load(pool, admitted, priority)
        return [one.evicted for one in admitted if one.evicted is not None]

    def _load(self, pool: _Pool, admitted: Sequence[Admission], priority: int) -> None:
        for one in admitted:
            if one.hit:
                continue
            if one.evicted in pool.loads:
                self.link.cancel(pool.loads.pop(one.evicted))
            size = self.recording.blocks[one.key[0]].size
            pool.loads[one.key] = self.link.submit(size, priority)

    def serve(self, request: Request) -> None:
        """Compute a block, as `Bank.run` does."""
        pool, demand = self._pool(request.block), self.recording.blocks[request.block]
        pool.latest = request.block
        if request.block == 0:
            self.trial.begin(request.tokens)
        keys = [(request.block, expert) for expert in request.experts]
        for key in pool.cache.let_in - set(keys):  # `serve` withdraws them
            if key[0] == request.block and key in pool.loads:
                self.link.stop(pool.loads.pop(key))
        missing = [key for key in keys if key not in pool.cache]
        self.guesses[request.block].check(request.experts, missing)
        self.compute("overhead", self.speed.call)
        rows = request.tokens * demand.active / max(1, len(request.experts))
        self.asked += len(keys)

        def submit(admitted: list[Admission]) -> None:
            for one in admitted:
                if one.hit and one.key in pool.loads:
                    pool.loads[one.key].priority = DEMAND
            self._load(pool, admitted, DEMAND)

        for admitted in serve(pool.cache, request, submit):
            self.hits += sum(one.hit for one in admitted)
            self._compute(pool, admitted, rows, demand)

    def _compute(
        self, pool: _Pool, admitted: Sequence[Admission], rows: float, demand: Demand
    ) -> None:
        start = 0
        while start < len(admitted):
            if self._late(pool, admitted[start].key):
                began = self.link.now
                self.link.wait(pool.loads.pop(admitted[start].key))
                part: Part = "prefetch_wait" if admitted[start].hit else "demand_wait"
                self.now.add(part, self.link.now - began)
                self.trial.waited += self.link.now - began
            end = start + 1
            while end < len(admitted) and not self._late(pool, admitted[end].key):
                end += 1
            self.compute("overhead", self.speed.launch)
            each = demand.size / self.speed.bandwidth * max(1.0, rows / self.speed.balance)
            self.compute("experts", (end - start) * each)
            start = end

    def _late(self, pool: _Pool, key: Key) -> bool:
        if key in pool.loads and pool.loads[key].done:
            del pool.loads[key]
        return key in pool.loads


def _calls(recording: Recording) -> Iterator[tuple[list[Guess | Ranking], Request]]:
    """Give each request, and the predictions that came before it."""
    before: list[Guess | Ranking] = []
    for event in recording.events:
        if isinstance(event, Request):
            yield before, event
            before = []
        else:
            before.append(event)

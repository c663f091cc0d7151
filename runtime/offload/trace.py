"""Record what was asked of the cache and what came of it, for reports, replays and plans."""

from dataclasses import dataclass, field

from moecc.runtime.offload.policy import Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One block's call: the experts that its tokens chose."""

    block: int
    tokens: int
    """T."""
    experts: tuple[int, ...]
    """Unique, ascending."""
    hits: int
    """Of these, how many were in slots or on their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """Experts that a prediction let in, in the order in which it named them."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """A prediction of a block's next request, whatever part of it was let in."""

    keys: tuple[Key, ...]
    """Likeliest first."""
    active: int
    """K: the first so many are what a token would ask for."""


Event = Request | Guess | Ranking


@dataclass(slots=True, kw_only=True)
class Counts:
    """Sums over requests."""

    requests: int = 0
    experts: int = 0
    """Asked for: each unique expert of a request once."""
    hits: int = 0
    """In a slot, or on their way to one."""
    late: int = 0
    """Of the hits, those that were still on their way."""
    predicted: int = 0
    """Loads that a prediction started."""
    useful: int = 0
    """Of those, the ones that were asked for before they left."""
    home: int = 0
    """Experts that were computed in host memory instead of waiting for their copy."""
    wait_seconds: float = 0.0
    """Time in which a block waited for experts."""
    late_seconds: float = 0.0
    """Of it, what went to experts that were on their way already."""

    @property
    def misses(self) -> int:
        """Loads that somebody had to wait for from their beginning."""
        return self.experts - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits over experts asked for; 1 before the first."""
        return self.hits / self.experts if self.experts else 1.0


@dataclass(slots=True)
class Trace:
    """Counters, and every request while `recording`."""

    counts: Counts = field(default_factory=Counts)
    recording: bool = False
    events: list[Event] = field(default_factory=list[Event])
    """Requests, and what was predicted; pools may share a list, for the order of all."""

    def add(self, request: Request, late: int) -> None:
        """Count a request, and keep it if asked to."""
        self.counts.requests += 1
        self.counts.experts += len(request.experts)
        self.counts.hits += request.hits
        self.counts.late += late
        if self.recording:
            self.events.append(request)

    def add_wait(self, seconds: float, foreseen: bool) -> None:
        """Count time in which a block waited for an expert, foreseen or not."""
        self.counts.wait_seconds += seconds
        self.counts.late_seconds += seconds * foreseen

    def add_ranking(self, keys: tuple[Key, ...], active: int) -> None:
        """Keep a prediction, for replays that let in another part of it."""
        if self.recording:
            self.events.append(Ranking(keys=keys, active=active))

    def add_guess(self, keys: tuple[Key, ...]) -> None:
        """Keep which experts a prediction named."""
        if self.recording and keys:
            self.events.append(Guess(keys=keys))

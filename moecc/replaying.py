"""Tell what other caches, and other machines, would have done in a recorded run: `moecc replay`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from rich.console import Console
from rich.table import Table

from moecc.passes.options import parse_memory
from moecc.placement import requests_of
from moecc.runtime.errors import OptionError
from moecc.runtime.offload.plan import share_by_benefit, share_slots
from moecc.runtime.offload.profile import Profile
from moecc.runtime.offload.recording import Pooled, Recording
from moecc.runtime.offload.replay import PREDICTIONS, REPLAYED, replay
from moecc.runtime.offload.simulate import GOVERNED, Simulated, simulate

OWN = "own"
"""What `--memory` calls the slots of the run itself, and `--pool` its pools."""
SHARED = "shared"
"""Pools of all blocks whose experts are of one size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting and what would have come of it."""

    memory: str
    pool: str
    policy: str
    predictions: str
    slots: tuple[int, ...]
    """Of each pool."""
    asked: int
    hits: int
    predicted: int
    """Loads that predictions started."""
    read_bytes: int
    simulated: Simulated | None
    """With a profile: how long it would have taken."""

    @property
    def misses(self) -> int:
        """Experts that are read while somebody waits from the beginning."""
        return self.asked - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits over experts asked for."""
        return self.hits / self.asked if self.asked else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The run that was replayed."""

    model: str
    policy: str
    pools: tuple[Pooled, ...]
    """Slots, and what the engine counted."""
    decode_rate: float
    """Tokens a second where it was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A run beside what others would have been."""

    run: Recorded
    profile: str | None
    """The name of the hardware whose times were simulated."""
    own: Row
    """The run's own settings, replayed."""
    rows: tuple[Row, ...]

    @property
    def agrees(self) -> bool:
        """The replay of the run's own settings counts what its engine counted."""
        counted = [(one.asked, one.hits, one.predicted) for one in self.run.pools]
        sums = tuple(map(sum, zip(*counted, strict=True)))
        return (self.own.asked, self.own.hits, self.own.predicted) == sums


def run(
    recording: Recording,
    policies: Sequence[str],
    memories: Sequence[str],
    predictions: Sequence[str],
    profile: Profile | None = None,
    by_benefit: bool = False,
    pools: Sequence[str] = (OWN,),
) -> Replayed:
    """Replay every combination, and the run's own setting.

    Raises `OptionError` for names that are unknown and budgets that are too small.
    """
    _check("--policy", policies, REPLAYED)
    _check("--predict", predictions, PREDICTIONS if profile is None else (*PREDICTIONS, GOVERNED))
    _check("--pool", pools, (OWN, SHARED))
    pooled = {OWN: recording, SHARED: recording.shared()}
    rows: list[Row] = []
    for memory, pool in product(memories, pools):
        slots = _slots(pooled[pool], memory, by_benefit)
        rows += [
            _row(pooled[pool], memory, pool, slots, policy, one, profile)
            for policy, one in product(policies, predictions)
        ]
    own = _slots(recording, OWN, False)
    return Replayed(
        run=Recorded(
            model=recording.model,
            policy=recording.policy,
            pools=recording.pools,
            decode_rate=recording.decode_rate,
        ),
        profile=profile and profile.name,
        own=_row(recording, OWN, OWN, own, recording.policy, "recorded", profile),
        rows=tuple(rows),
    )


def _row(
    recording: Recording,
    memory: str,
    pool: str,
    slots: Sequence[int],
    policy: str,
    predictions: str,
    profile: Profile | None,
) -> Row:
    """Simulate if there is a profile: it counts what a replay counts."""
    simulated = None
    if profile is not None:
        simulated = simulate(recording, profile, slots, policy, predictions)
        counts = simulated.asked, simulated.hits, simulated.predicted, simulated.read_bytes
    else:
        outcomes = [
            (replay(recording.of_pool(number), count, policy, predictions=predictions),
             recording.size_in(number))
            for number, count in enumerate(slots)
        ]  # fmt: skip
        each = [(one.asked, one.hits, one.predicted, one.loads * size) for one, size in outcomes]
        counts = tuple(map(sum, zip(*each, strict=True)))
    asked, hits, predicted, read_bytes = counts
    return Row(
        memory=memory,
        pool=pool,
        policy=policy,
        predictions=predictions,
        slots=tuple(slots),
        asked=asked,
        hits=hits,
        predicted=predicted,
        read_bytes=read_bytes,
        simulated=simulated,
    )


def _slots(recording: Recording, memory: str, by_benefit: bool) -> list[int]:
    """Share a budget among blocks; pools have the slots of their blocks together."""
    if memory == OWN:
        return [pool.slots for pool in recording.pools]
    budget = parse_memory(memory)
    assert budget is not None
    if by_benefit:
        shares = share_by_benefit(recording.blocks, budget, requests_of(recording))
    else:
        shares = share_slots(recording.blocks, budget)
    slots = [0] * len(recording.pools)
    for pool, share in zip(recording.pool_of, shares, strict=True):
        slots[pool] += share
    return slots


def _check(option: str, given: Iterable[str], allowed: Sequence[str]) -> None:
    for one in given:
        if one not in allowed:
            more = "; governed needs a --profile" if one == GOVERNED else ""
            raise OptionError(f"{option} {one!r} is not one of {list(allowed)}{more}")


def print_replayed(shown: Replayed, console: Console) -> None:
    """Print a line for each setting, and whether the run's own gives what its engine counted."""
    timed = shown.profile is not None
    table = Table("memory", "pool", "policy", "predict", box=None, pad_edge=False)
    counted = ("misses", "predicted", "MB read")
    told = ("tokens/s", "compute", "demand wait", "prefetch wait")
    for name in ("slots", "hits", *(told if timed else counted)):
        table.add_column(name, justify="right")
    for row in (shown.own, *shown.rows):
        least, most = min(row.slots), max(row.slots)
        slots = str(least) if least == most else f"{least}–{most}"
        cells = [row.memory, row.pool, row.policy, row.predictions, slots, f"{row.hit_rate:.1%}"]
        if row.simulated is None:
            cells += [str(row.misses), str(row.predicted), f"{row.read_bytes / 1e6:,.1f}"]
        else:
            decode, total = row.simulated.decode, row.simulated.decode.total or 1.0
            waits = decode.demand_wait, decode.prefetch_wait
            shares = ((total - sum(waits)) / total, *(one / total for one in waits))
            cells += [f"{row.simulated.decode_rate:.1f}", *(f"{share:.0%}" for share in shares)]
        table.add_row(*cells)
    console.print(table)
    if timed:
        console.print(
            f"decoding on {shown.profile}, simulated; the run itself had "
            f"{shown.run.decode_rate:.1f} tokens/s where it was made",
            markup=False,
            highlight=False,
        )
    if not shown.agrees:
        console.print("the replay of the run's own settings does not count what its engine counted")

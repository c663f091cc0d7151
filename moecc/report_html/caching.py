"""Show what a cache of experts did in a recorded run, forward pass by forward pass.

The run's own events are replayed with its own slots, policy and predictions, which gives exactly
what its engine counted (`moecc.runtime.offload.replay`).
"""

from dataclasses import dataclass

from moecc.report_html.chart import Axis, Chart, legend, nice
from moecc.report_html.page import Section, command
from moecc.runtime.offload.recording import Recording, block_of
from moecc.runtime.offload.replay import play
from moecc.runtime.offload.trace import Request

_MOST = 240
"""Columns of a picture; longer runs have several passes in one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward pass: every block asks once."""

    tokens: int
    asked: int
    hits: int
    demand_bytes: int
    """Read while a block waited."""
    early_bytes: int
    """Read because a prediction said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caching:
    """A run, pass by pass."""

    slots: tuple[int, ...]
    """Of each pool."""
    policy: str
    passes: tuple[Pass, ...]


def gather(recording: Recording) -> Caching:
    """Replay a run in its own order, and sum up each pass."""
    players = [
        play(recording.of_pool(number), pool.slots, recording.policy, predictions="recorded")
        for number, pool in enumerate(recording.pools)
    ]
    passes: list[Pass] = []
    tokens = asked = hits = demand = early = 0
    latest = -1

    def close() -> None:
        if asked:
            passes.append(
                Pass(tokens=tokens, asked=asked, hits=hits, demand_bytes=demand, early_bytes=early)
            )

    for event in recording.events:
        block = block_of(event)
        one = next(players[recording.pool_of[block]])
        size = recording.blocks[block].size
        if isinstance(event, Request):
            if block <= latest:
                close()
                asked = hits = demand = early = 0
            latest, tokens = block, event.tokens
            asked, hits = asked + len(event.experts), hits + one.hits
            demand += (len(event.experts) - one.hits) * size
        early += one.predicted * size
    close()
    return Caching(
        slots=tuple(pool.slots for pool in recording.pools),
        policy=recording.policy,
        passes=tuple(passes),
    )


def section(caching: Caching, trace: str) -> Section:
    """Write hits and misses above, what was read below."""
    if not caching.passes:
        return Section(key="cache", title="Cache", html="<p>The trace has no request.</p>")
    columns = _columns(caching.passes)
    many = -(-len(caching.passes) // len(columns))
    asked, hits = (sum(getattr(one, name) for one in caching.passes) for name in ("asked", "hits"))
    least, most = min(caching.slots), max(caching.slots)
    slots = str(least) if least == most else f"{least}–{most}"
    told = (
        f"<p>{len(caching.passes)} forward passes with {slots} slots and policy {caching.policy}, "
        f"from an empty cache: {hits} of {asked} experts asked for were there or on their way "
        f"({hits / asked:.1%}){f'; {many} passes a column' if many > 1 else ''}.</p>"
    )
    key = [("bar hit", "hit"), ("bar miss", "miss: read while its block waits")]
    reads = [("bar miss", "read on demand"), ("bar early", "read early, as predicted")]
    again = command(
        f"moecc replay {trace} --policy lru,belady --memory 25%,50%", "What other caches would do:"
    )
    html = f"{told}{_hits(columns)}{legend(key)}{_reads(columns)}{legend(reads)}{again}"
    return Section(key="cache", title="Cache", html=html)


def _columns(passes: tuple[Pass, ...]) -> list[Pass]:
    """Put neighbouring passes together until they fit a picture."""
    many = -(-len(passes) // _MOST)
    names = ("tokens", "asked", "hits", "demand_bytes", "early_bytes")
    return [
        Pass(**{name: sum(getattr(one, name) for one in passes[at : at + many]) for name in names})
        for at in range(0, len(passes), many)
    ]


def _hits(columns: list[Pass]) -> str:
    x = Axis(low=0, high=len(columns), label="forward pass", whole=True)
    chart = Chart(
        x=x,
        y=Axis(low=0, high=100, label="experts asked for", suffix=" %"),
        title="hits and misses of each forward pass",
        height=230,
    )
    for at, one in enumerate(columns):
        share = one.hits / one.asked * 100
        told = f"pass {at}: {one.tokens} tokens, {one.hits} hits of {one.asked}"
        chart.bar((at + 0.08, 0), (at + 0.92, share), "bar hit", told)
        chart.bar((at + 0.08, share), (at + 0.92, 100), "bar miss", told)
    return chart.svg()


def _reads(columns: list[Pass]) -> str:
    most = max(one.demand_bytes + one.early_bytes for one in columns) / 1e6
    chart = Chart(
        x=Axis(low=0, high=len(columns), label="forward pass", whole=True),
        y=Axis(low=0, high=nice(most), label="MB read"),
        title="bytes read in each forward pass",
        height=230,
    )
    for at, one in enumerate(columns):
        demand, both = one.demand_bytes / 1e6, (one.demand_bytes + one.early_bytes) / 1e6
        told = f"pass {at}: {demand:.2f} MB on demand, {both - demand:.2f} MB early"
        chart.bar((at + 0.08, 0), (at + 0.92, demand), "bar miss", told)
        chart.bar((at + 0.08, demand), (at + 0.92, both), "bar early", told)
    return chart.svg()

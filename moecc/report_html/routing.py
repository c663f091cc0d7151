"""Show how a recorded run spread its requests over experts: a heatmap, and figures of imbalance.

A call asks for each expert once, however many of its tokens chose it. So loads are counted over
calls of one token, where that is the same; only a trace without any counts all calls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from moecc.placement import requests_of
from moecc.report_html.chart import compact
from moecc.report_html.page import Section, details, table
from moecc.runtime.offload.recording import Recording

_LEVELS = 8
_ROWS = 12
"""Rows of figures that are shown without being asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imbalance:
    """How unevenly the experts of one block are asked for."""

    peak: float
    """The most asked for, over the mean."""
    variation: float
    """Standard deviation over the mean."""
    entropy: float
    """Of a request's expert, over that of an even choice: 1 is even, 0 always the same."""
    unused: float
    """Share of experts that were never asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Requests for each expert of each block."""

    names: tuple[str, ...]
    loads: tuple[tuple[int, ...], ...]
    """[blocks, experts]"""
    calls: int
    """That were counted, of all blocks together."""
    single: bool
    """They were calls of one token."""
    imbalances: tuple[Imbalance, ...]


def gather(recording: Recording) -> Routing:
    """Count a trace's requests."""
    requests = requests_of(recording)
    counted = [one for one in requests if one.tokens == 1] or requests
    loads = [[0] * block.experts for block in recording.blocks]
    for one in counted:
        for expert in one.experts:
            loads[one.block][expert] += 1
    return Routing(
        names=tuple(block.name for block in recording.blocks),
        loads=tuple(map(tuple, loads)),
        calls=len(counted),
        single=all(one.tokens == 1 for one in counted),
        imbalances=tuple(map(imbalance, loads)),
    )


def imbalance(loads: Sequence[int]) -> Imbalance:
    """Measure one block; a block that was never asked is even."""
    mean = sum(loads) / len(loads)
    if not mean:
        return Imbalance(peak=1.0, variation=0.0, entropy=1.0, unused=1.0)
    shares = [load / sum(loads) for load in loads if load]
    even = math.log(len(loads))
    return Imbalance(
        peak=max(loads) / mean,
        variation=math.sqrt(sum((load - mean) ** 2 for load in loads) / len(loads)) / mean,
        entropy=-sum(share * math.log(share) for share in shares) / even if even else 1.0,
        unused=loads.count(0) / len(loads),
    )


def section(routing: Routing) -> Section:
    """Write the heatmap and the figures."""
    what = "decoded tokens" if routing.single else "calls"
    each = routing.calls // max(1, len(routing.names))
    told = (
        f"<p>How often each expert was asked for in {each} {what} a block, relative to an even "
        "spread of its block. Point at a cell for its count.</p>"
    )
    rows = [
        (name, f"{one.peak:.2f}", f"{one.variation:.2f}", f"{one.entropy:.3f}", f"{one.unused:.1%}")
        for name, one in zip(routing.names, routing.imbalances, strict=True)
    ]
    heads = ("block", "max / mean", "coefficient of variation", "entropy / even", "never used")
    more = rows[_ROWS:]
    figures = table(heads, rows[:_ROWS])
    figures += details(f"{len(more)} more blocks", table(heads, more)) if more else ""
    html = f"{told}{_heatmap(routing)}<h3>Imbalance</h3>{figures}"
    return Section(key="experts", title="Expert load", html=html)


def _heatmap(routing: Routing) -> str:
    """Draw a row for each block, a column for each expert; one path for each level of colour."""
    most = max(map(len, routing.loads))
    cell = max(5.0, min(30.0, 1000 / most))
    tall = max(min(cell, 22.0), 11.0)
    labels = [_label(name) for name in routing.names]
    left = max(map(len, labels)) * 6.2 + 8
    top, height = 22.0, tall * len(routing.loads)
    paths: dict[int, list[str]] = {}
    peak = max((one.peak for one in routing.imbalances), default=1.0)
    for row, loads in enumerate(routing.loads):
        mean = sum(loads) / len(loads) or 1.0
        for column, load in enumerate(loads):
            level = math.ceil(load / mean / peak * _LEVELS) if load else 0
            x, y = left + column * cell, top + row * tall
            box = f"M{x:.1f} {y:.1f}h{cell - 1:.1f}v{tall - 1:.1f}h{1 - cell:.1f}z"
            paths.setdefault(level, []).append(box)
    cells = "".join(f'<path class="q{at}" d="{"".join(some)}"/>' for at, some in paths.items())
    names = "".join(
        f'<text class="tick end" x="{left - 6:.0f}" y="{top + tall * (row + 0.5) + 4:.1f}">'
        f"{escape(label)}</text>"
        for row, label in enumerate(labels)
    )
    step = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * cell >= 30 or n >= most)
    numbers = "".join(
        f'<text class="tick" x="{left + (at + 0.5) * cell:.1f}" y="{top - 7:.0f}">{at}</text>'
        for at in range(0, most, step)
    )
    width = left + most * cell + 4
    shape = f'data-left="{left:.1f}" data-top="{top:.0f}" data-cell="{cell:.2f}" data-row="{tall}"'
    scale = "".join(f'<i class="q{level}"></i>' for level in range(1, _LEVELS + 1))
    return (
        f'<div class="scroll"><svg class="heat" id="heat" {shape} width="{width:.0f}" '
        f'height="{top + height + 4:.0f}" viewBox="0 0 {width:.0f} {top + height + 4:.0f}" '
        f'role="img" aria-label="requests by block and expert">{numbers}{names}{cells}</svg></div>'
        f'<p class="scale"><i class="q0"></i> never <span></span> 0 {scale} {compact(peak)} × even'
        '<output id="heat-cell"></output></p>'
    )


def _label(name: str) -> str:
    """Shorten `model.layers.3.mlp.experts` to `layers.3`."""
    parts = name.split(".")
    for part, number in groupby(enumerate(parts), key=lambda one: one[1].isdecimal()):
        if part:
            at = next(number)[0]
            return ".".join(parts[max(0, at - 1) : at + 1])
    return name

"""Show where the experts of a block stand under the roofs of a machine, by number of tokens.

T tokens choose K of E experts, all as likely: each chosen expert's weights are read once, and every
assignment costs two FLOPs a weight. Roofs are a profile's: reading, and products in bf16, whose
ratio is its `balance`. What a launch and a call take keeps small blocks below them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moecc.codegen.triton_costs import expected_experts
from moecc.passes.ir import MoeBlock
from moecc.report_html.chart import Axis, Chart, legend
from moecc.report_html.page import Section, table
from moecc.runtime.offload.profile import Profile

_TOKENS = tuple(2**power for power in range(15))
_SHOWN = (1, 16, 256, 4096, 16384)
_BYTES = 2
"""Of a weight in bf16, whose roofs profiles give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A block's experts at a number of tokens."""

    tokens: int
    intensity: float
    """FLOPs for each byte of weights."""
    rate: float
    """FLOPs a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """A machine, and what it makes of the block."""

    profile: str
    bandwidth: float
    """Bytes a second."""
    peak: float
    """FLOPs a second."""
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """One shape of block on some machines."""

    shape: str
    blocks: int
    """That have it."""
    roofs: tuple[Roof, ...]


def gather(blocks: Sequence[MoeBlock], profiles: Sequence[Profile]) -> tuple[Roofline, ...]:
    """Work out each shape of block on each machine."""
    shapes: dict[tuple[int, int, int, int, bool], int] = {}
    for one in blocks:
        key = one.experts, one.active, one.hidden_size, one.intermediate, one.gated
        shapes[key] = shapes.get(key, 0) + 1
    return tuple(
        Roofline(
            shape=f"E={key[0]}, K={key[1]}, H={key[2]}, I={key[3]}",
            blocks=count,
            roofs=tuple(roof_of(key, profile) for profile in profiles),
        )
        for key, count in shapes.items()
    )


def roof_of(shape: tuple[int, int, int, int, bool], profile: Profile) -> Roof:
    """Work out a block of (E, K, H, I, gated) on a machine."""
    experts, active, hidden, intermediate, gated = shape
    weights = (3 if gated else 2) * hidden * intermediate
    speed = profile.compute
    peak = speed.bandwidth * speed.balance * 2 / _BYTES

    def point(tokens: int) -> Point:
        flops = 2.0 * tokens * active * weights
        read = float(expected_experts(tokens, active, experts)) * weights * _BYTES
        seconds = max(read / speed.bandwidth, flops / peak) + speed.launch + speed.call
        return Point(tokens=tokens, intensity=flops / read, rate=flops / seconds)

    return Roof(
        profile=profile.name,
        bandwidth=speed.bandwidth,
        peak=peak,
        points=tuple(map(point, _TOKENS)),
    )


def section(rooflines: Sequence[Roofline]) -> Section:
    """Write a picture and a table for each shape."""
    told = (
        "<p>Experts in bf16 under the roofs of each machine: to the right, more tokens reuse the "
        "weights that are read. Expected, not measured; below the roof is the time of launches.</p>"
    )
    html = told + "".join(f"{_head(one)}{_draw(one)}{_rows(one)}" for one in rooflines)
    return Section(key="roofline", title="Roofline", html=html)


def _head(one: Roofline) -> str:
    return f"<h3>{one.blocks} block{'s' * (one.blocks > 1)} of {one.shape}</h3>"


def _draw(one: Roofline) -> str:
    points = [point for roof in one.roofs for point in roof.points]
    right = max(*(point.intensity for point in points), *(r.peak / r.bandwidth for r in one.roofs))
    chart = Chart(
        x=Axis(low=0.5, high=right * 2, label="FLOPs for each byte of weights", log=True),
        y=Axis(
            low=min(point.rate for point in points) / 1e12 / 4,
            high=max(roof.peak for roof in one.roofs) / 1e12 * 2,
            label="TFLOP/s",
            log=True,
        ),
        title=f"roofline of {one.shape}",
    )
    for number, roof in enumerate(one.roofs):
        bend = roof.peak / roof.bandwidth
        ends = [(x, min(roof.peak, roof.bandwidth * x) / 1e12) for x in (0.5, bend, right * 2)]
        chart.line(ends, f"s{number} roof")
        chart.line([(one.intensity, one.rate / 1e12) for one in roof.points], f"s{number}")
        for point in roof.points:
            if point.tokens in _SHOWN:
                at = (point.intensity, point.rate / 1e12)
                rate = f"{point.rate / 1e12:.3g} TFLOP/s"
                told = f"{roof.profile}: {point.tokens} tokens, {rate}"
                chart.dot(at, f"s{number}", told)
    for at, tokens in enumerate(_TOKENS):
        if tokens in _SHOWN:
            low = min((roof.points[at] for roof in one.roofs), key=lambda point: point.rate)
            chart.label((low.intensity, low.rate / 1e12), f"T={tokens}")
    entries = [(f"key s{number}", roof.profile) for number, roof in enumerate(one.roofs)]
    return chart.svg() + legend([*entries, ("key roof", "roof")])


def _rows(one: Roofline) -> str:
    heads = ("tokens", "FLOPs/byte", *(f"{roof.profile}: TFLOP/s" for roof in one.roofs))
    shown = [at for at, tokens in enumerate(_TOKENS) if tokens in _SHOWN]
    rows = [
        (
            _TOKENS[at],
            f"{one.roofs[0].points[at].intensity:.1f}",
            *(f"{roof.points[at].rate / 1e12:.3g}" for roof in one.roofs),
        )
        for at in shown
    ]
    return table(heads, rows)

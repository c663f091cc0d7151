"""Draw axes, lines and bars as SVG whose colours are the page's, light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 16.0, 14.0, 46.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of numbers, and how they are written."""

    low: float
    high: float
    label: str
    log: bool = False
    suffix: str = ""
    whole: bool = False
    """Ticks are whole numbers."""

    def at(self, value: float) -> float:
        """Give the place of a value, 0 to 1."""
        if self.log:
            span = math.log(self.high / self.low)
            return math.log(max(value, self.low) / self.low) / span
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """List round numbers in the range: powers of ten or two, or about five steps."""
        if self.log:
            base = 10 if self.high / self.low > 200 else 2
            first = math.ceil(math.log(self.low, base) - 1e-9)
            last = math.floor(math.log(self.high, base) + 1e-9)
            step = max(1, -(-(last - first) // 8))
            return [float(base) ** power for power in range(first, last + 1, step)]
        rough = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * n for n in (1, 2, 5, 10) if size * n >= rough)
        step = max(1.0, step) if self.whole else step
        count = math.floor((self.high - self.low) / step + 1e-9)
        return [self.low + step * n for n in range(count + 1)]

    def text(self, value: float) -> str:
        """Write a tick."""
        return f"{compact(value)}{self.suffix}"


@dataclass(slots=True, kw_only=True)
class Chart:
    """What is drawn so far, in pixels."""

    x: Axis
    y: Axis
    title: str
    """Said to those who cannot see it."""
    width: float = 1120
    height: float = 360
    parts: list[str] = field(default_factory=list[str])

    def place(self, point: Point) -> Point:
        """Give the pixel of a point."""
        across = self.width - _LEFT - _RIGHT
        down = self.height - _TOP - _BOTTOM
        return (
            _LEFT + across * self.x.at(point[0]),
            _TOP + down * (1 - self.y.at(point[1])),
        )

    def line(self, points: Sequence[Point], kind: str) -> None:
        """Draw a line with a class."""
        path = " ".join("{:.1f},{:.1f}".format(*self.place(point)) for point in points)
        self.parts.append(f'<polyline class="line {kind}" points="{path}"/>')

    def dot(self, point: Point, kind: str, told: str) -> None:
        """Draw a dot that tells something when it is pointed at."""
        x, y = self.place(point)
        told = f"<title>{escape(told)}</title>"
        self.parts.append(
            f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4">{told}</circle>'
        )

    def bar(self, low: Point, high: Point, kind: str, told: str = "") -> None:
        """Fill what is between two corners."""
        (left, bottom), (right, top) = self.place(low), self.place(high)
        title = f"<title>{escape(told)}</title>" if told else ""
        self.parts.append(
            f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" '
            f'width="{max(0.5, right - left):.1f}" height="{max(0.0, bottom - top):.1f}">'
            f"{title}</rect>"
        )

    def label(self, point: Point, text: str) -> None:
        """Write below a point."""
        x, y = self.place(point)
        self.parts.append(f'<text class="note" x="{x:.1f}" y="{y + 19:.1f}">{escape(text)}</text>')

    def svg(self) -> str:
        """Write the axes, and everything on them."""
        inside = f"{''.join(self._grid())}{''.join(self.parts)}"
        return (
            f'<div class="figure"><svg class="chart" role="img" '
            f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" '
            f'aria-label="{escape(self.title)}">{inside}</svg></div>'
        )

    def _grid(self) -> list[str]:
        left, bottom = _LEFT, self.height - _BOTTOM
        right = self.width - _RIGHT
        parts: list[str] = []
        for tick in self.x.ticks():
            x, _ = self.place((tick, self.y.low))
            parts.append(f'<path class="grid" d="M{x:.1f} {_TOP:.0f}V{bottom:.0f}"/>')
            text = escape(self.x.text(tick))
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16:.0f}">{text}</text>')
        for tick in self.y.ticks():
            _, y = self.place((self.x.low, tick))
            parts.append(f'<path class="grid" d="M{left:.0f} {y:.1f}H{right:.0f}"/>')
            text = escape(self.y.text(tick))
            parts.append(f'<text class="tick end" x="{left - 7:.0f}" y="{y + 4:.1f}">{text}</text>')
        middle_x, middle_y = (left + right) / 2, (_TOP + bottom) / 2
        parts.append(
            f'<text class="axis" x="{middle_x:.0f}" y="{self.height - 8:.0f}">'
            f"{escape(self.x.label)}</text>"
        )
        parts.append(
            f'<text class="axis" transform="translate(13 {middle_y:.0f}) rotate(-90)">'
            f"{escape(self.y.label)}</text>"
        )
        return parts


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Write what the classes of a chart stand for."""
    items = "".join(f'<li><i class="{kind}"></i>{escape(text)}</li>' for kind, text in entries)
    return f'<ul class="legend">{items}</ul>'


def compact(value: float) -> str:
    """Write a number in few letters: 12, 1.5k, 20M, 0.25."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= scale:
            return f"{value / (1e3 if letter == 'k' else scale):.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def nice(value: float) -> float:
    """Round up to a number with one digit, or 1.5 or 2.5 of it."""
    if value <= 0:
        return 1.0
    size = 10 ** math.floor(math.log10(value))
    return next(size * n for n in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if size * n >= value)


def amount(size: float) -> str:
    """Write a number of bytes."""
    scale, unit = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return f"{size / scale:,.1f} {unit}"

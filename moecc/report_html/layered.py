"""Place boxes of a directed graph in layers, after Sugiyama: ranks, order, then coordinates.

For pictures of up to about a hundred boxes; nothing here knows what is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

GAP_X, GAP_Y = 18.0, 26.0
_LANE = 10.0
"""Width that an edge takes where it passes a layer."""
_SWEEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything is, in the unit of the sizes."""

    centers: tuple[tuple[float, float], ...]
    routes: tuple[tuple[tuple[float, float], ...], ...]
    """Of each edge, from the bottom of one box to the top of the other."""
    width: float
    height: float


def place(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]]) -> Layout:
    """Place boxes of (width, height); an edge goes from a box to one with a larger number."""
    ranks = _ranks(len(sizes), edges)
    widths = [width for width, _ in sizes]
    paths = [_path(start, end, ranks, widths) for start, end in edges]
    layers: list[list[int]] = [[] for _ in range(max(ranks, default=-1) + 1)]
    for one, rank in enumerate(ranks):
        layers[rank].append(one)
    links = [pair for path in paths for pair in pairwise(path)]
    before: list[list[int]] = [[] for _ in widths]
    after: list[list[int]] = [[] for _ in widths]
    for start, end in links:
        after[start].append(end)
        before[end].append(start)
    _order(layers, before, after)
    xs = _coordinates(layers, before, after, widths)
    tops, height = _tops(layers, sizes)
    centers = tuple(
        (xs[one], tops[ranks[one]][0] + tops[ranks[one]][1] / 2) for one in range(len(sizes))
    )
    return Layout(
        centers=centers,
        routes=tuple(_route(path, xs, ranks, tops, sizes, centers) for path in paths),
        width=max((x + width / 2 for x, width in zip(xs, widths, strict=True)), default=0.0),
        height=height,
    )


def _ranks(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Rank each box below all that it reads; what reads nothing is just above its first reader."""
    ranks = [0] * count
    for start, end in sorted(edges, key=lambda edge: edge[1]):
        ranks[end] = max(ranks[end], ranks[start] + 1)
    read = {end for _, end in edges}
    for one in range(count):
        readers = [ranks[end] for start, end in edges if start == one]
        if one not in read and readers:
            ranks[one] = min(readers) - 1
    return ranks


def _path(start: int, end: int, ranks: list[int], widths: list[float]) -> list[int]:
    """Lead an edge through layers: adds an empty box in each that it passes."""
    path = [start]
    for rank in range(ranks[start] + 1, ranks[end]):
        path.append(len(widths))
        ranks.append(rank)
        widths.append(_LANE)
    return [*path, end]


def _order(layers: list[list[int]], before: list[list[int]], after: list[list[int]]) -> None:
    """Order each layer by the mean place of neighbours, down and up in turns."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        rows, near = (layers, before) if down else (layers[::-1], after)
        where = {one: at for row in layers for at, one in enumerate(row)}
        for row in rows:
            means = {
                one: sum(where[other] for other in near[one]) / len(near[one])
                if near[one]
                else float(where[one])
                for one in row
            }
            row.sort(key=means.__getitem__)
            where |= {one: at for at, one in enumerate(row)}


def _coordinates(
    layers: list[list[int]],
    before: list[list[int]],
    after: list[list[int]],
    widths: list[float],
) -> list[float]:
    """Put boxes near what they are linked to, without overlaps; gives the centers."""
    xs = [0.0] * len(widths)
    for row in layers:
        _spread(row, [0.0] * len(row), widths, xs)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in layers if down else layers[::-1]:
            near = [before[one] if down else after[one] for one in row]
            wanted = [
                sum(xs[other] for other in some) / len(some) if some else xs[one]
                for one, some in zip(row, near, strict=True)
            ]
            _spread(row, wanted, widths, xs)
    left = min((xs[one] - widths[one] / 2 for one in range(len(xs))), default=0.0)
    return [x - left for x in xs]


def _spread(
    row: Sequence[int], wanted: Sequence[float], widths: Sequence[float], xs: list[float]
) -> None:
    """Move boxes of a row least, in squares, from where they want to be: isotonic regression."""
    offsets: list[float] = []
    for at, one in enumerate(row):
        gap = (widths[row[at - 1]] + widths[one]) / 2 + GAP_X if at else 0.0
        offsets.append((offsets[-1] if offsets else 0.0) + gap)
    blocks: list[tuple[float, int]] = []  # mean and size of runs that stand close together
    for want, offset in zip(wanted, offsets, strict=True):
        mean, size = want - offset, 1
        while blocks and blocks[-1][0] > mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    starts = [mean for mean, size in blocks for _ in range(size)]
    for one, start, offset in zip(row, starts, offsets, strict=True):
        xs[one] = start + offset


def _tops(
    layers: list[list[int]], sizes: Sequence[tuple[float, float]]
) -> tuple[list[tuple[float, float]], float]:
    """Give each layer's top and height, and where the last one ends."""
    tops: list[tuple[float, float]] = []
    y = 0.0
    for row in layers:
        tall = max((sizes[one][1] for one in row if one < len(sizes)), default=0.0)
        tops.append((y, tall))
        y += tall + GAP_Y
    return tops, max(0.0, y - GAP_Y)


def _route(
    path: Sequence[int],
    xs: Sequence[float],
    ranks: Sequence[int],
    tops: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    centers: Sequence[tuple[float, float]],
) -> tuple[tuple[float, float], ...]:
    start, *passed, end = path
    points = [(xs[start], centers[start][1] + sizes[start][1] / 2)]
    for one in passed:
        top, tall = tops[ranks[one]]
        points += [(xs[one], top), (xs[one], top + tall)]
    return (*points, (xs[end], centers[end][1] - sizes[end][1] / 2))

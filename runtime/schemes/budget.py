"""Share bits among matrices: the least error for so many bytes, each matrix in one of its schemes.

    errors = [relative_errors(weights, candidates) for weights in matrices]
    chosen = allocate(errors, sizes, budget)         # an index into candidates for each matrix

The choice is a multiple-choice knapsack. Steps between schemes on the lower convex hull of each
matrix (bytes against error) are taken in order of error saved a byte, as long as they fit; the last
ones that fit are found by looking on after the first that does not. That is the best for every
budget that a whole number of steps fills, and at most one step's error away from it otherwise.
Errors of different matrices are compared as they are; `moecc.budgets` says what they weigh.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from moecc.runtime.errors import InputError
from moecc.runtime.schemes.packing import dequantize, quantize
from moecc.runtime.schemes.scheme import INT8, Scheme, grouped, int4

CANDIDATES = (
    *(grouped("int2", 64, zeros=True), grouped("int3", 64), grouped("int3")),
    *(int4(128), int4(128, zeros=True), int4(64), int4(64, zeros=True)),
    *(int4(), int4(zeros=True), INT8),
)
"""What a matrix may get, from few bits to many."""

Point = tuple[int, int, float]
"""A candidate: its index, bytes and error."""


def allocate(
    errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """Choose a candidate for each matrix so that sizes add up to at most `budget` bytes.

    `errors[m][c]` and `sizes[m][c]` are what candidate c costs matrix m. Equal inputs give equal
    choices. Raises `InputError` when the smallest candidates do not fit, saying what they take.
    """
    hulls = [
        _hull([(c, size, error) for c, (size, error) in enumerate(zip(*both, strict=True))])
        for both in zip(sizes, errors, strict=True)
    ]
    left = budget - sum(hull[0][1] for hull in hulls)
    if left < 0:
        raise InputError(
            f"the smallest schemes take {budget - left:,} bytes, more than the {budget:,} allowed"
        )
    steps = [
        (-(low[2] - high[2]) / (high[1] - low[1]), matrix, place)
        for matrix, hull in enumerate(hulls)
        for place, (low, high) in enumerate(pairwise(hull), 1)
    ]
    reached = [0] * len(hulls)
    for _, matrix, place in sorted(steps):
        more = hulls[matrix][place][1] - hulls[matrix][place - 1][1]
        if reached[matrix] == place - 1 and more <= left:
            reached[matrix], left = place, left - more
    return [hull[place][0] for hull, place in zip(hulls, reached, strict=True)]


def relative_error(weights: Sequence[torch.Tensor], scheme: Scheme) -> float:
    """Measure what a scheme changes of matrices [N, K]: squared error over squared weights."""
    lost = kept = 0.0
    for weight in weights:
        wide = weight.float()
        known = dequantize(quantize(wide, scheme), scheme)[:, : wide.shape[1]]
        lost += float((known - wide).square().sum(dtype=torch.float64))
        kept += float(wide.square().sum(dtype=torch.float64))
    return lost / kept if kept else 0.0


def _hull(points: Sequence[Point]) -> list[Point]:
    """Keep the lower convex hull: each step costs more bytes for less error a byte."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda one: (one[1], one[2], one[0])):
        if hull and point[2] >= hull[-1][2]:
            continue  # no better than what takes no more
        while hull and point[1] == hull[-1][1]:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(low: Point, high: Point) -> float:
    return (high[2] - low[2]) / (high[1] - low[1])

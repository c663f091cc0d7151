"""Fit codes to groups of weights: groups side by side as columns, a few hundred KB at a time.

Everything is elementwise along columns, and sums are added in a fixed order, so that results do not
depend on the number of threads.
"""

from collections.abc import Iterator, Sequence

import torch

from moecc.runtime.schemes.scheme import Quantized

_PART = 2**17
"""Weights at a time: what a fit keeps about them stays in the caches."""


def by_column(weight: torch.Tensor, block: int) -> Iterator[torch.Tensor]:
    """Give the groups of a matrix [N, K] in parts, float32 [block, groups]."""
    groups = weight.reshape(-1, block)
    for start in range(0, len(groups), _PART // block):
        yield groups[start : start + _PART // block].float().T.contiguous()


def weighed_by_column(
    weight: torch.Tensor, block: int, importance: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Give the groups of a matrix as `by_column` does, and what their errors weigh, in that form.

    `importance` is [K], the same for every row; None: all errors weigh 1.
    """
    start = 0
    for part in by_column(weight, block):
        weights = None
        if importance is not None:
            of_group = importance.float().reshape(-1, block)
            groups = torch.arange(start, start + part.shape[1]) % len(of_group)
            weights = of_group[groups].T.contiguous()
        yield part, weights
        start += part.shape[1]


def weigh(part: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Multiply by weights, if there are any."""
    return part if weights is None else part * weights


def put_together(parts: Sequence[Quantized], rows: int) -> Quantized:
    """Make a matrix of so many rows from the parts of `by_column`: codes [block, groups] each."""
    codes = torch.cat([one.codes.T for one in parts]).reshape(rows, -1)
    scales = torch.cat([one.scales for one in parts]).reshape(rows, -1)
    zeros = [one.zeros for one in parts if one.zeros is not None]
    return Quantized(
        codes=codes, scales=scales, zeros=torch.cat(zeros).reshape(rows, -1) if zeros else None
    )


def total(part: torch.Tensor) -> torch.Tensor:
    """Add the rows of [2^n, groups] up, halves onto halves."""
    while len(part) > 1:
        low, high = part.chunk(2)
        part = low + high
    return part[0]

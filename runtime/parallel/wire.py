"""Measure what a group's collectives cost, once, so that all ranks go by the same numbers."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moecc.runtime.parallel.ranks import Ranks

_TIMES = 5
_BULK = 1 << 18
"""Bytes to each other rank: long enough that latency is a small part on a fast link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """The link between ranks, as the slowest of them sees it."""

    gather: float
    """Seconds of an all-gather of next to nothing."""
    swap: float
    """Seconds of such an all-to-all."""
    bandwidth: float
    """Bytes a second that a rank sends, to all others together."""


def measure(ranks: Ranks) -> Wire:
    """Time a few collectives; all ranks have to."""
    even = [1] * ranks.size
    small, bulk = (
        torch.zeros(ranks.size, size, dtype=torch.uint8, device=ranks.device) for size in (8, _BULK)
    )
    gather = _least(lambda: ranks.gather(small, "measuring"))
    swap = _least(lambda: ranks.exchange(small, even, even, "measuring"))
    long = _least(lambda: ranks.exchange(bulk, even, even, "measuring"))
    own = torch.tensor([gather, swap, long], dtype=torch.float64, device=ranks.device)
    slowest = ranks.gather(own, "measuring").amax(dim=0)
    gather, swap, long = (float(one) for one in slowest)
    sent = (ranks.size - 1) * _BULK
    return Wire(gather=gather, swap=swap, bandwidth=sent / max(long - swap, 1e-9))


def _least(call: Callable[[], torch.Tensor]) -> float:
    """Time a call at its best: the first ones also make connections."""
    seconds: list[float] = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        call().sum().item()  # results on a GPU are waited for
        seconds.append(time.perf_counter() - start)
    return min(seconds)

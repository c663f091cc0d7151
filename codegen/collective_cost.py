"""Price the ways of bringing tokens to experts on other ranks, and solve for where they cross.

A collective costs its latency and then its bytes over the slowest rank's bandwidth. Bytes are what
one rank sends; a token of K experts that are anywhere has, of the N - 1 other ranks, on average
(N - 1)(1 - (1 - 1/N)^K) that compute for it.
"""

from functools import cache
from typing import Any

import sympy as _sympy  # pyright: ignore[reportMissingTypeStubs]

from moecc.runtime.parallel.exchange import Shape
from moecc.runtime.parallel.wire import Wire

sympy: Any = _sympy
T, N, K, OUT, BACK, GATHER, SWAP, BANDWIDTH = sympy.symbols(
    "T N K b_out b_back t_gather t_swap B", positive=True
)
_OTHERS = N - 1
_ABROAD = _OTHERS * (1 - (1 - 1 / N) ** K)

SECONDS = {
    ("replicated", "gather"): GATHER + _OTHERS * T * BACK / BANDWIDTH,
    ("replicated", "scatter"): SWAP + GATHER + 2 * _OTHERS / N * T * BACK / BANDWIDTH,
    ("split", "gather"): GATHER + SWAP + _OTHERS * T * (OUT + BACK) / BANDWIDTH,
    ("split", "all_to_all"): 2 * SWAP + _ABROAD * T * (OUT + BACK) / BANDWIDTH,
}
"""Of the collectives of one block, beside the header that all need."""


@cache
def few_tokens(wire: Wire, shape: Shape) -> float:
    """Give the number of tokens up to which gathering is sooner than what sends fewer bytes."""
    known = {
        N: shape.ranks, K: shape.active, OUT: shape.out, BACK: shape.back,
        GATHER: wire.gather, SWAP: wire.swap, BANDWIDTH: wire.bandwidth,
    }  # fmt: skip
    ways = [one for (tokens, _), one in SECONDS.items() if tokens == shape.tokens]
    lead = sympy.expand((ways[0] - ways[1]).subs(known))  # linear in T; gathering sends no less
    latency, slope = float(lead.subs(T, 0)), float(lead.coeff(T))
    if slope <= 1e-9 / wire.bandwidth:  # two ranks get the same bytes either way
        return float("inf") if latency < 0 else 0.0
    return max(0.0, -latency / slope)

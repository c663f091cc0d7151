"""Price one decoding step of a model whose experts are partly elsewhere, as expressions.

    compute   what the step takes with every expert there
    read      bytes of experts that are not, over the link
    on demand, reads and computing follow one another; hidden, they overlap wholly: a bound

Numbers come last (`Step`, a profile), so that what a figure depends on can be read, and the hit
rate from which the link no longer matters is solved for, not searched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy as _sympy  # pyright: ignore[reportMissingTypeStubs]

from moecc.runtime.offload.profile import Profile

sympy: Any = _sympy

(
    HITS, ACTIVE, OTHERS, BLOCKS, BANDWIDTH, LINK, LAYER, CALL, LAUNCH, TOKEN,
) = sympy.symbols("h A O L B W t_layer t_call t_launch t_token", positive=True)  # fmt: skip
LEGEND: Mapping[str, str] = {
    "h": "hit rate",
    "A": "bytes of the experts of one token",
    "O": "bytes of other weights that a token reads",
    "L": "blocks",
    "B": "bytes a second that kernels read",
    "W": "bytes a second of the link",
    "t": "seconds of a layer, a bank's call, a kernel's launch, a token",
}

COMPUTE = TOKEN + (OTHERS + ACTIVE) / BANDWIDTH + BLOCKS * (LAYER + CALL + LAUNCH)
READ = (1 - HITS) * ACTIVE / LINK
ON_DEMAND = 1 / (COMPUTE + READ)
HIDDEN = 1 / sympy.Max(COMPUTE, READ)
"""Tokens a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a token reads."""

    blocks: int
    active_bytes: int
    """Of the experts of one token in all blocks."""
    other_bytes: int
    """Of other weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Tokens a second at a hit rate."""

    on_demand: float
    hidden: float
    """With reads behind computing, as far as they fit: a bound."""
    enough_hits: float
    """The hit rate from which hidden reads are free."""


def price(step: Step, profile: Profile, hit_rate: float) -> Price:
    """Evaluate the expressions for a model on a machine."""
    known = _known(step, profile)
    (enough,) = sympy.solve(sympy.Eq(COMPUTE, READ), HITS)
    at = known | {HITS: hit_rate}
    return Price(
        on_demand=float(ON_DEMAND.subs(at)),
        hidden=float(HIDDEN.subs(at)),
        enough_hits=min(1.0, max(0.0, float(enough.subs(known)))),
    )


def curves(
    step: Step, profile: Profile, hit_rates: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give tokens a second at several hit rates: on demand, and with hidden reads."""
    known = _known(step, profile)
    both = [sympy.lambdify(HITS, one.subs(known), "math") for one in (ON_DEMAND, HIDDEN)]
    on_demand, hidden = (tuple(float(one(rate)) for rate in hit_rates) for one in both)
    return on_demand, hidden


def _known(step: Step, profile: Profile) -> dict[Any, float]:
    return {
        ACTIVE: step.active_bytes, OTHERS: step.other_bytes, BLOCKS: step.blocks,
        BANDWIDTH: profile.compute.bandwidth, LINK: profile.link.bandwidth,
        LAYER: profile.compute.layer, CALL: profile.compute.call,
        LAUNCH: profile.compute.launch, TOKEN: profile.compute.token,
    }  # fmt: skip


def formulas() -> dict[str, str]:
    """Give the expressions as text."""
    named = {"compute": COMPUTE, "read": READ, "on demand": ON_DEMAND, "hidden": HIDDEN}
    return {name: str(one) for name, one in named.items()}

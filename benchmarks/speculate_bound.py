"""Tell how much drafts could gain at most, by the shipped model's routing and links of any speed.

    python -m benchmarks.speculate_bound

In simulated time, over on-demand LRU in the same memory. Copying a token's experts takes `ratio`
times as long as computing a token whose experts are there, as behind a throttled link
(`benchmarks.speculate --link`); 17 to 61 is an A100 behind PCIe 4 (`benchmarks.offload_sweep`). The
text is not generated: what this model writes repeats itself more, and caches and drafts gain more.

    lfu          on demand
    oracle       no drafts: each block's request known when the one before it ends, and Belady
    copies       drafts of the best depth on copies that take slots, right as often as was measured
    cached       drafts on what is cached, likewise; both compute as long as the model
    perfect      drafts that are always right, on copies that take slots but no time
    free         the same without taking slots
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from benchmarks.routing import observe
from benchmarks.timing import table
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.profile import ComputeSpeed, LinkSpeed, Profile
from moecc.runtime.offload.recording import Pooled, Recording
from moecc.runtime.offload.simulate import simulate
from moecc.runtime.offload.simulate_drafts import Draft, simulate_drafts
from moecc.runtime.offload.trace import Request

EXPERTS, ACTIVE = 32, 4
COPIES = 8
"""Slots of a block that int3 copies take."""
INT3 = 0.88
"""Chance of a token of int3 drafts: 71 % of eight are right, 87 % of two (`docs/benchmarks.md`)."""
CACHED = {12: 0.73, 16: 0.81, 20: 0.89, 24: 0.96, 28: 0.98}
"""Of drafts on so many cached experts: of four, 49, 61, 76, 92 and 96 % are right."""
SETS = 0.8
"""Chance that a draft names all experts of a block, assumed; the rest names one of them wrongly."""
DEPTHS = (1, 2, 4, 8)
GOAL = 2.34
"""MoE-SpeQ's gain on Phi-MoE (arXiv 2511.14102)."""
SIZE = 1 << 20
"""Bytes of an expert: one chunk. Only ratios count here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Rates over that of LRU, at one ratio and budget."""

    ratio: float
    slots: int
    lfu: float
    oracle: float
    copies: float
    cached: float
    perfect: float
    free: float


def main() -> None:
    """Print bounds, and where the goal is within them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--ratios", default="0.5,1,2,4,8,32")
    parser.add_argument("--slots", default="12,16,20,24,28", help=f"of {EXPERTS}: {[*CACHED]}")
    arguments = parser.parse_args()
    recording = record(observe(arguments.tokens)[1])
    bounds = [
        bound(recording, slots, ratio)
        for slots in map(int, arguments.slots.split(","))
        for ratio in map(float, arguments.ratios.split(","))
    ]
    names = ("lfu", "oracle", "copies", "cached", "perfect", "free")
    lines = [["slots", "ratio", *names]]
    for one in bounds:
        rates = [f"{getattr(one, name):.2f}x" for name in names]
        lines.append([f"{one.slots} of {EXPERTS}", f"{one.ratio:g}", *rates])
    print(table(lines))
    for name in names:
        rates = [getattr(one, name) for one in bounds]
        reached = sum(rate >= GOAL for rate in rates)
        print(f"{name}: {max(rates):.2f}x at most, {GOAL}x in {reached} cells")


def record(chosen: Sequence[torch.Tensor]) -> Recording:
    """Make a recording of what each block chose, [T, K]."""
    events = [
        Request(block=block, tokens=1, experts=tuple(experts), hits=0)
        for token in torch.stack(list(chosen), dim=1).sort().values
        for block, experts in enumerate(cast(list[list[int]], token.tolist()))
    ]
    demand = Demand(name="", experts=EXPERTS, active=ACTIVE, size=SIZE)
    return Recording(
        model="reference",
        policy="lru",
        blocks=(demand,) * len(chosen),
        pool_of=tuple(range(len(chosen))),
        pools=(Pooled(slots=EXPERTS, asked=0, hits=0, predicted=0),) * len(chosen),
        other_bytes=0,
        decode_rate=0.0,
        events=tuple(events),
    )


def bound(recording: Recording, slots: int, ratio: float) -> Bound:
    """Simulate every way of decoding; a token takes a second to compute."""
    blocks = len(recording.blocks)
    active = blocks * ACTIVE * SIZE
    compute = ComputeSpeed(
        bandwidth=active, balance=1e9, launch=0.0, call=0.0, layer=0.0, token=0.0,
        beside_reads=1.0, after_reads=1.0,
    )  # fmt: skip
    link = LinkSpeed(bandwidth=active / ratio, stream=active / ratio, latency=0.0)
    profile = Profile(name="", tier="", source="", link=link, compute=compute)

    def plain(policy: str, predictions: str = "none") -> float:
        each = [slots] * blocks
        return simulate(recording, profile, each, policy, predictions).decode_rate

    def drafted(left: int, token: float, experts: float = SETS, size: float = 1.0) -> float:
        each, draft = [left] * blocks, Draft(depth=0, token=token, experts=experts, size=size)
        runs = (replace(draft, depth=depth) for depth in DEPTHS)
        return max(simulate_drafts(recording, profile, each, "lookahead", one).rate for one in runs)

    lru, left = plain("lru"), slots - COPIES
    return Bound(
        ratio=ratio,
        slots=slots,
        lfu=plain("lfu") / lru,
        oracle=plain("belady", "perfect") / lru,
        copies=drafted(left, INT3) / lru,
        cached=drafted(slots, CACHED[slots]) / lru,
        perfect=drafted(left, 1.0, 1.0, 0.0) / lru,
        free=drafted(slots, 1.0, 1.0, 0.0) / lru,
    )


if __name__ == "__main__":
    main()

"""Tell how much drafts could gain at most, by the shipped model's routing and links of any speed.

    python -m benchmarks.speculate_bound

In simulated time, over on-demand LRU in the same memory. Copying a token's experts takes `ratio`
times as long as computing a token whose experts are there, as behind a throttled link
(`benchmarks.speculate --link`); 23 to 54 is an A100 behind PCIe 4 (`benchmarks.offload_sweep`).

    lfu          on demand
    oracle       no drafts: each block's request known when the one before it ends, and Belady
    drafts       at the best depth, right as often as was measured, computing as much as the model
    perfect      always right, for nothing
    free copies  perfect, where copies take no slots
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
MEASURED = Draft(depth=0, token=0.88, experts=0.8, size=0.25)
"""int3 drafts of the shipped model: 71 % of eight are right, 87 % of two (`docs/benchmarks.md`)."""
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
    drafts: float
    perfect: float
    free_copies: float


def main() -> None:
    """Print bounds, and where the goal is within them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--ratios", default="0.5,1,2,4,8,32")
    parser.add_argument("--slots", default="12,16,20,24,28", help=f"of {EXPERTS}")
    arguments = parser.parse_args()
    recording = record(observe(arguments.tokens)[1])
    bounds = [
        bound(recording, slots, ratio)
        for slots in map(int, arguments.slots.split(","))
        for ratio in map(float, arguments.ratios.split(","))
    ]
    names = ("lfu", "oracle", "drafts", "perfect", "free_copies")
    lines = [["slots", "ratio", *(name.replace("_", " ") for name in names)]]
    for one in bounds:
        rates = [f"{getattr(one, name):.2f}x" for name in names]
        lines.append([f"{one.slots} of {EXPERTS}", f"{one.ratio:g}", *rates])
    print(table(lines))
    for name in names:
        rates = [getattr(one, name) for one in bounds]
        reached = sum(rate >= GOAL for rate in rates)
        print(f"{name.replace('_', ' ')}: {max(rates):.2f}x at most, {GOAL}x in {reached} cells")


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

    def drafted(draft: Draft, left: int) -> float:
        if left < ACTIVE:
            return 0.0
        each = [left] * blocks
        runs = (replace(draft, depth=depth) for depth in DEPTHS)
        return max(simulate_drafts(recording, profile, each, "lookahead", one).rate for one in runs)

    lru, left = plain("lru"), slots - COPIES
    sure = Draft(depth=0, token=1.0, experts=1.0, size=0.0)
    return Bound(
        ratio=ratio,
        slots=slots,
        lfu=plain("lfu") / lru,
        oracle=plain("belady", "perfect") / lru,
        drafts=drafted(replace(MEASURED, size=1.0), left) / lru,
        perfect=drafted(sure, left) / lru,
        free_copies=drafted(sure, slots) / lru,
    )


if __name__ == "__main__":
    main()

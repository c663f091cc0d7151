"""Simulate MoE-SpeQ's set-ups, and say how far the prediction is from what the paper measured.

    python -m benchmarks.speculate_paper

Shapes are the models' own, hardware is the profile `a100-pcie4`. The paper gives no routing,
so experts are drawn: evenly, and by Zipf's law, with which LRU hits what the paper measured of
DeepSeek-V2-Lite (its table 3: 29.2, 50.9, 61.1, 76.6 and 95.8 % with 6, 16, 22, 32 and 48 slots).
Tokens of drafts are right in 90 % and sets of experts in 90.9 %, as it says; the depth is the best.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.timing import table
from moecc.runtime.offload import profile as profiles
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.recording import Pooled, Recording
from moecc.runtime.offload.replay import replay
from moecc.runtime.offload.simulate import simulate
from moecc.runtime.offload.simulate_drafts import Draft, simulate_drafts
from moecc.runtime.offload.trace import Request

GPU = "a100-pcie4"
COPY = (4 + 16 / 128) / 16
"""Bytes of an int4 copy over those of bf16: GPTQ, a float16 scale for 128 codes."""
TOKEN, EXPERTS = 0.9, 0.909
"""How often drafts are right (arXiv 2511.14102, figures 5 and 6)."""
LRU = "lru, the cache that drafts leave"
SAME = "lru, same memory"
DRAFTS = "drafts"
PERFECT = "drafts that are always right"
DEPTHS = (1, 2, 4, 8, 16)
"""The best of them is shown: the paper's governor chooses, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A model as its configuration on the hub describes it, in bf16, and what was measured."""

    name: str
    layers: int
    """With experts."""
    experts: int
    active: int
    hidden: int
    intermediate: int
    used: float
    """Parameters that a token uses, as its authors say."""
    slots: int
    """Of a layer, beside the copies: by the paper, or what is left of 40 GiB."""
    paper: dict[str, float]
    """Milliseconds a token."""

    @property
    def size(self) -> int:
        """Bytes of an expert."""
        return 3 * self.hidden * self.intermediate * 2

    @property
    def others(self) -> int:
        """Bytes that a token reads beside its experts."""
        return int(self.used * 2) - self.layers * self.active * self.size

    @property
    def copies(self) -> int:
        """Slots of a layer that copies take."""
        return round(self.experts * COPY)


SETUPS = (
    Setup(
        name="Phi-3.5-MoE", layers=32, experts=16, active=2, hidden=4096, intermediate=6400,
        used=6.6e9, slots=3,
        paper={LRU: 536.7, SAME: 351.8, DRAFTS: 163.1},
    ),
    Setup(
        name="Qwen1.5-MoE-A2.7B", layers=24, experts=60, active=4, hidden=2048, intermediate=1408,
        used=2.7e9, slots=6,
        paper={LRU: 2.5 * 74.1, DRAFTS: 74.1},
    ),
    Setup(
        name="DeepSeek-V2-Lite", layers=26, experts=64, active=6, hidden=2048, intermediate=1408,
        used=2.4e9, slots=6,
        paper={DRAFTS: 1000 / 13.02},
    ),
)  # fmt: skip
"""Table 3 gives DeepSeek's slots in 16 GB; Qwen's are assumed to be as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One way of decoding in one set-up; milliseconds a token."""

    model: str
    routing: str
    decode: str
    slots: int
    predicted: float
    paper: float | None


def main() -> None:
    """Print predictions beside measurements."""
    parser = argparse.ArgumentParser(description="Simulate the set-ups of MoE-SpeQ.")
    parser.add_argument("--tokens", type=int, default=32)
    tokens = parser.parse_args().tokens
    lines = [["model", "decode", "slots", "experts drawn", "predicted", "paper", "apart"]]
    for one in (found for setup in SETUPS for found in predict(setup, tokens)):
        measured = ["", ""]
        if one.paper is not None:
            measured = [f"{one.paper:.1f} ms", f"{one.predicted / one.paper - 1:+.0%}"]
        lines.append([one.model, one.decode, str(one.slots), one.routing])
        lines[-1] += [f"{one.predicted:.1f} ms", *measured]
    print(table(lines))
    hits = [f"{hit_rate(SETUPS[2], slots):.1%}" for slots in (6, 16, 22, 32, 48)]
    print(f"\nlru hits of DeepSeek-V2-Lite by Zipf's law: {', '.join(hits)}")


def predict(setup: Setup, tokens: int) -> list[Prediction]:
    """Simulate a set-up with both routings."""
    found: list[Prediction] = []
    for routing, skew in (("evenly", 0.0), ("Zipf", 1.0)):
        recording = draw(setup, tokens + max(DEPTHS), skew)
        for decode, slots, rate in _rates(setup, recording):
            found.append(
                Prediction(
                    model=setup.name,
                    routing=routing,
                    decode=decode,
                    slots=slots,
                    predicted=1e3 / rate,
                    paper=setup.paper.get(decode.partition(", k=")[0]),
                )
            )
    return found


def _rates(setup: Setup, recording: Recording) -> Iterator[tuple[str, int, float]]:
    """Give each way of decoding, its slots, and tokens a second."""
    gpu = profiles.read(GPU)
    for decode, slots in ((LRU, setup.slots), (SAME, setup.slots + setup.copies)):
        simulated = simulate(recording, gpu, [slots] * setup.layers, "lru", "none")
        yield decode, slots, simulated.decode_rate
    for decode, token, experts in ((DRAFTS, TOKEN, EXPERTS), (PERFECT, 1.0, 1.0)):
        rate, depth = max(
            (simulate_drafts(
                recording, gpu, [setup.slots] * setup.layers, "lookahead",
                Draft(depth=depth, token=token, experts=experts, size=COPY),
            ).rate, depth)
            for depth in DEPTHS
        )  # fmt: skip
        yield f"{decode}, k={depth}", setup.slots, rate


def draw(setup: Setup, tokens: int, skew: float) -> Recording:
    """Draw experts for so many tokens; the n-th most frequent as often as n ** -skew."""
    dice = np.random.default_rng(0)
    weights = np.log(np.arange(1, setup.experts + 1)) * -skew
    each = [dice.permutation(weights) for _ in range(setup.layers)]
    events = [
        Request(block=block, tokens=1, experts=_top(each[block], setup.active, dice), hits=0)
        for _ in range(tokens)
        for block in range(setup.layers)
    ]
    demand = Demand(name="", experts=setup.experts, active=setup.active, size=setup.size)
    return Recording(
        model=setup.name,
        policy="lru",
        blocks=(demand,) * setup.layers,
        pool_of=tuple(range(setup.layers)),
        pools=(Pooled(slots=setup.slots, asked=0, hits=0, predicted=0),) * setup.layers,
        other_bytes=setup.others,
        decode_rate=0.0,
        events=tuple(events),
    )


def _top(weights: np.ndarray, active: int, dice: np.random.Generator) -> tuple[int, ...]:
    """Draw without putting back, by adding Gumbel noise to the logarithms of chances."""
    noisy = weights + dice.gumbel(size=len(weights))
    return tuple(sorted(np.argpartition(-noisy, active)[:active].tolist()))


def hit_rate(setup: Setup, slots: int, tokens: int = 400) -> float:
    """Give LRU's hits in one layer by Zipf's law."""
    events: Sequence[Request] = [
        one for one in draw(setup, tokens, 1.0).of_pool(0) if isinstance(one, Request)
    ]
    return replay(events, slots, "lru").hit_rate


if __name__ == "__main__":
    main()

"""Time the expert cache behind links as slow, beside computing, as a GPU's are.

    python -m benchmarks.offload_sweep --json benchmarks/results/offload-sweep.json

A GPU that computes a token in g seconds with every expert there, and would copy all experts of a
token in b seconds, keeps its link b / g times as busy as itself. Here the experts lie in memory
(`--folder`, a tmpfs) behind a link that is throttled until that ratio is the same: what a cache and
predictions are worth depends on it, on the budget and on routing, which is the trained model's. The
contenders are those of `benchmarks.offload`, and take turns.

`of oracle` is the rate over that of Belady and perfect predictions behind the same link, simulated;
`over on-demand` is what predictions are worth to the same policy.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import moecc
from benchmarks.offload import PROMPT, REFERENCE
from benchmarks.offload_contenders import Contender, new_contender
from benchmarks.timing import machine, stamp, table
from benchmarks.widened import widen
from moecc.footprint import other_bytes
from moecc.generate import generate
from moecc.lenders import banks_of
from moecc.loading import demands_of
from moecc.profiling import measure as measure_profile
from moecc.runtime.offload import profile as profiles
from moecc.runtime.offload.profile import LinkSpeed, Profile
from moecc.runtime.offload.recording import Pooled, Recording
from moecc.runtime.offload.simulate import simulate

CONTENDERS = ("no cache", "lru", "lfu", "lfu + prefetch")
GPU = "a100-pcie4"
"""The profile of the GPU, whose link is MoE-SpeQ's (arXiv 2511.14102): 16 GB/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A model as its configuration on the hub describes it, in bf16."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    """I of a routed expert."""
    active: int
    """K."""
    parameters: float
    """That a token uses, as its authors say; experts included."""

    def ratio(self, gpu: Profile) -> float:
        """Give the time to copy a token's experts over that to compute the token."""
        expert = 3 * self.hidden * self.intermediate * 2
        copied = self.layers * self.active * expert / gpu.link.bandwidth
        speed = gpu.compute
        layer = speed.layer + speed.call + speed.launch
        return copied / (self.parameters * 2 / speed.bandwidth + self.layers * layer + speed.token)


MODELS = (
    Published(
        name="Mixtral-8x7B",
        layers=32, hidden=4096, intermediate=14336, active=2, parameters=12.9e9,
    ),
    Published(
        name="Phi-3.5-MoE",
        layers=32, hidden=4096, intermediate=6400, active=2, parameters=6.6e9,
    ),
    Published(
        name="Qwen1.5-MoE-A2.7B",
        layers=24, hidden=2048, intermediate=1408, active=4, parameters=2.7e9,
    ),
)  # fmt: skip
"""Those that MoE-SpeQ and this project's goals name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One contender, budget and link."""

    model: str
    """Whose ratio the link has."""
    ratio: float
    memory: str
    contender: str
    tokens_per_second: float
    hit_rate: float
    megabytes_per_token: float
    over_lru: float
    over_on_demand: float | None
    """Of a contender with predictions: over the same policy without."""
    of_oracle: float
    same_tokens: bool
    """As with all experts in memory."""


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", default="12.5%,25%,50%", help="parts of the experts")
    parser.add_argument("--widen", type=int, default=32, help="times the experts' size")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--models", default=",".join(one.name for one in MODELS))
    parser.add_argument("--folder", type=Path, default="/dev/shm", help="of a tmpfs")
    parser.add_argument("--inner", default="inductor", help="compiles what is not MoE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cells = measure(widen(REFERENCE, Path(folder) / "model", arguments.widen), arguments)
    if arguments.json:
        record = {**stamp(), "widen": arguments.widen, "gpu": GPU}
        results = [asdict(cell) for cell in cells]
        arguments.json.write_text(json.dumps(record | {"results": results}, indent=2) + "\n")


def measure(folder: Path, arguments: argparse.Namespace) -> list[Cell]:
    """Time every contender behind every link at every budget, and print a table for each link."""
    model: Any = moecc.load(folder, expert_memory="100%")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids: torch.Tensor = tokenizer(PROMPT, return_tensors="pt").input_ids
    options = {"inner": arguments.inner}
    model.forward = torch.compile(model.forward, backend="moecc", dynamic=True, options=options)
    generate(model, ids, arguments.new_tokens)  # compiles, and brings every expert in
    resident = generate(model, ids, arguments.new_tokens)
    profile = measure_profile(model, ids, min(16, arguments.new_tokens), "here")
    stores = [bank.store for bank in banks_of(model)]
    blocks = tuple(demands_of(model, stores))
    active = sum(one.active * one.size for one in blocks)
    print(f"{machine()}; in memory {resident.decode_rate:.1f} tokens/s")
    cells: list[Cell] = []
    for published in MODELS:
        if published.name not in arguments.models.split(","):
            continue
        ratio = published.ratio(profiles.read(GPU))
        limit = active * resident.decode_rate / ratio
        behind = replace(profile, link=LinkSpeed(bandwidth=limit, stream=limit, latency=0.0))
        found: list[Cell] = []
        for memory in arguments.memory.split(","):
            slots = int(float(memory.rstrip("%")) / 100 * blocks[0].experts)
            contenders = [new_contender(name, stores, slots, limit) for name in CONTENDERS]
            for _ in range(1 + arguments.rounds):
                for one in contenders:
                    one.round(model, ids, arguments.new_tokens)
                    one.link.close()
            recording = Recording(
                model=folder.name,
                policy="lru",
                blocks=blocks,
                pool_of=tuple(range(len(blocks))),
                pools=(Pooled(slots=slots, asked=0, hits=0, predicted=0),) * len(blocks),
                other_bytes=other_bytes(model),
                decode_rate=0.0,
                events=tuple(contenders[0].events),
            )
            oracle = simulate(recording, behind, [slots] * len(blocks), "belady", "perfect")
            about = {"model": published.name, "ratio": ratio, "memory": memory}
            found += _cells(contenders, oracle.decode_rate, resident.tokens, about)
        print(f"\n{published.name}: copying takes {ratio:.0f} x computing, {limit / 1e6:.0f} MB/s")
        print(_table(found), flush=True)
        cells += found
    return cells


def _cells(
    contenders: Sequence[Contender], oracle: float, tokens: tuple[int, ...], about: dict[str, Any]
) -> list[Cell]:
    """Compare contenders with each other and with what an oracle could do."""
    rates = {
        one.name: statistics.median(timing.decode_rate for timing in one.timings)
        for one in contenders
    }
    cells: list[Cell] = []
    for one in contenders:
        counts = [bank.pool.trace.counts for bank in one.banks]
        rate, policy = rates[one.name], one.name.removesuffix(" + prefetch")
        cells.append(
            Cell(
                **about,
                contender=one.name,
                tokens_per_second=rate,
                hit_rate=sum(c.hits for c in counts) / sum(c.experts for c in counts),
                megabytes_per_token=one.read_bytes
                / sum(len(timing.tokens) for timing in one.timings)
                / 1e6,
                over_lru=rate / rates["lru"],
                over_on_demand=rate / rates[policy] if policy != one.name else None,
                of_oracle=rate / oracle,
                same_tokens=all(timing.tokens == tokens for timing in one.timings),
            )
        )
    return cells


def _table(cells: Sequence[Cell]) -> str:
    lines = [["memory", "", "tokens/s", "hits", "MB/token", "over lru", "over on-demand"]]
    lines[0] += ["of oracle", "same tokens"]
    for cell in cells:
        worth = "" if cell.over_on_demand is None else f"{cell.over_on_demand:.2f}x"
        lines.append([cell.memory, cell.contender, f"{cell.tokens_per_second:.2f}"])
        lines[-1] += [f"{cell.hit_rate:.1%}", f"{cell.megabytes_per_token:.1f}"]
        lines[-1] += [f"{cell.over_lru:.2f}x", worth, f"{cell.of_oracle:.0%}"]
        lines[-1] += ["yes" if cell.same_tokens else "NO"]
    return table(lines)


if __name__ == "__main__":
    main()

"""Time decoding with experts on disk: what the cache, its policy and predictions are worth.

    python -m benchmarks.offload --memory 25%,50% --widen 64 --json FILE

Every contender runs the same compiled model, the same kernels and the same tokens; only the banks
behind its experts differ. Files are read past the page cache. The model is the shipped one with its
experts made larger (`benchmarks/widened.py`), so that routing is that of a trained model.

    no cache      an expert is read whenever a token needs it (expert-aware, nothing kept)
    lru, lfu      on demand, into slots
    + prefetch    the next layer's experts predicted with its router, read if that pays
    bound         the larger of the time with all experts in memory and Belady's misses (the fewest
                  that any cache of so many slots can have) at the link's bandwidth
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import moecc
from benchmarks.timing import machine, table
from benchmarks.widened import widen
from moecc.generate import generate
from moecc.lenders import lenders_of
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.policy import POLICIES
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.replay import replay
from moecc.runtime.offload.stand_in import bind

REFERENCE = Path(__file__).parent / "reference"
PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form."


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender at one budget."""

    contender: str
    memory: str
    slots: int
    """Of each block."""
    tokens_per_second: float
    hit_rate: float
    megabytes_per_token: float
    waited: float
    """Share of the time in which a block waited for experts."""
    same_tokens: bool
    """As with all experts in memory."""


class NoCache:
    """A bank that forgets its experts after every call."""

    schemes = None

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def run(self, *arguments: Any) -> torch.Tensor:
        """Compute the block, and forget."""
        out = self.bank.run(*arguments)
        for key in list(self.bank.pool.cache):
            self.bank.pool.cache.drop(key)
        return out

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Ignore predictions."""


class OnDemand(NoCache):
    """A bank that ignores predictions."""

    def run(self, *arguments: Any) -> torch.Tensor:
        """Compute the block."""
        return self.bank.run(*arguments)


CONTENDERS: dict[str, tuple[str, Callable[[Bank], Any]]] = {
    "no cache": ("lru", NoCache),
    "lru": ("lru", OnDemand),
    "lfu": ("lfu", OnDemand),
    "lru + prefetch": ("lru", lambda bank: bank),
    "lookahead + prefetch": ("lookahead", lambda bank: bank),
}


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", default="25%,50%", help="parts of the experts, in per cent")
    parser.add_argument("--widen", type=int, default=64, help="times the experts' size")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rows = measure(widen(REFERENCE, Path(folder), arguments.widen), arguments)
    if arguments.json:
        record = {"machine": machine(), "widen": arguments.widen}
        record["results"] = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def measure(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Time every contender at every budget, and print the tables."""
    model: Any = moecc.load(folder, expert_memory="100%")
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    banks = [lender for _, lender in lenders_of(model) if isinstance(lender, Bank)]
    experts, size = banks[0].store.experts, banks[0].store.layout.size
    model.forward = torch.compile(model.forward, backend="moecc", dynamic=True)
    generate(model, ids, arguments.new_tokens)  # compiles, and brings every expert in
    resident = [generate(model, ids, arguments.new_tokens) for _ in range(arguments.rounds)]
    whole = statistics.median(one.decode_rate for one in resident)
    bandwidth = banks[0].pool.link.bandwidth or 0.0
    print(machine())
    print(
        f"{len(banks)} blocks of {experts} experts, {size / 1e6:.2f} MB each, "
        f"{len(banks) * experts * size / 1e6:.0f} MB; in memory {whole:.1f} tokens/s"
    )
    rows: list[Row] = []
    for memory in arguments.memory.split(","):
        slots = int(float(memory.rstrip("%")) / 100 * experts)
        found = [
            _time(name, memory, slots, model, banks, ids, resident[0].tokens, arguments)
            for name in CONTENDERS
        ]
        rows += [row for row, _ in found]
        events, bandwidth = found[1][1]
        fewest = sum(replay(one, slots, "belady").misses for one in events)
        steps = sum(len(one) for one in events) / len(events)
        seconds = max(1 / whole, fewest * size / steps / bandwidth)
        _print(memory, slots, [row for row, _ in found], 1 / seconds, bandwidth)
    return rows


def _time(
    name: str,
    memory: str,
    slots: int,
    model: Any,
    banks: Sequence[Bank],
    ids: torch.Tensor,
    expected: tuple[int, ...],
    arguments: argparse.Namespace,
) -> tuple[Row, tuple[list[Any], float]]:
    """Give a contender banks of its own, warm them with one generation, and time others."""
    policy, wrap = CONTENDERS[name]
    link = Link()
    own = [
        Bank(
            number=bank.number,
            store=bank.store,
            pool=Pool(bank.store.layout, slots, POLICIES[policy], link),
        )
        for bank in banks
    ]
    modules = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    for module, bank in zip(modules, own, strict=True):
        lender = wrap(bank)
        for parameter in (module.gate_up_proj, module.down_proj):
            bind(parameter, lender)
    generate(model, ids, arguments.new_tokens)
    before, bytes_before = _sums(own), link.bytes
    for bank in own:
        bank.pool.trace.recording = True
    timings = [generate(model, ids, arguments.new_tokens) for _ in range(arguments.rounds)]
    asked, hits, waited = (after - b for after, b in zip(_sums(own), before, strict=True))
    seconds = sum(one.prefill_seconds + one.decode_seconds for one in timings)
    steps = arguments.rounds * arguments.new_tokens
    row = Row(
        contender=name,
        memory=memory,
        slots=slots,
        tokens_per_second=statistics.median(one.decode_rate for one in timings),
        hit_rate=hits / asked,
        megabytes_per_token=(link.bytes - bytes_before) / steps / 1e6,
        waited=waited / seconds,
        same_tokens=all(one.tokens == expected for one in timings),
    )
    bandwidth = link.bandwidth or 1.0
    link.close()
    return row, ([bank.pool.trace.events for bank in own], bandwidth)


def _sums(banks: Sequence[Bank]) -> tuple[float, float, float]:
    counts = [bank.pool.trace.counts for bank in banks]
    return (
        sum(one.experts for one in counts),
        sum(one.hits for one in counts),
        sum(one.wait_seconds for one in counts),
    )


def _print(memory: str, slots: int, rows: Sequence[Row], bound: float, bandwidth: float) -> None:
    base = next(row for row in rows if row.contender == "lru").tokens_per_second
    lines = [[f"{memory}, {slots} slots", "tokens/s", "over lru", "hits", "MB/token", "waited"]]
    for row in rows:
        rate = row.tokens_per_second
        lines.append([row.contender, f"{rate:.1f}", f"{rate / base:.2f}x", f"{row.hit_rate:.1%}"])
        lines[-1] += [f"{row.megabytes_per_token:.1f}", f"{row.waited:.0%}"]
    lines.append(["bound", f"{bound:.1f}", f"{bound / base:.2f}x", "", "", ""])
    print(f"\nthe link reads {bandwidth / 1e6:.0f} MB/s")
    print(table(lines))
    different = [row.contender for row in rows if not row.same_tokens]
    print(f"tokens differ: {different}" if different else "all gave the same tokens", flush=True)


if __name__ == "__main__":
    main()

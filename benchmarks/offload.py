"""Time decoding with experts on disk: what the cache, its policy and predictions are worth.

    python -m benchmarks.offload --memory 25%,50% --widen 64 --json FILE --plot FOLDER
    python -m benchmarks.offload --timeline FILE        one more generation, for ui.perfetto.dev

Every contender but accelerate runs the same compiled model, the same kernels and the same tokens;
only the banks behind its experts differ. Files are read past the page cache. The model is the
shipped one with its experts made larger (`benchmarks/widened.py`), so that routing is that of a
trained model. Contenders take turns, and medians of all rounds are told.

    accelerate    device_map, layers read whole from disk, given the bytes that moecc has in all
    llama.cpp     the same weights in a mapped file, with as many bytes for weights, in a cgroup
    no cache      an expert is read whenever a token needs it (expert-aware, nothing kept)
    lru, lfu      on demand, into slots; lfu is the default
    + prefetch    the next layer's experts predicted with its router, the first one's by the token,
                  and read if that pays
    foreseen      simulated here: lfu, and every request known when the one before it ends, which is
                  what predictions could be worth
    oracle        the same with Belady's cache
    bound         the larger of the time with all experts in memory and Belady's misses (the fewest
                  that any cache of so many slots can have) at the link's bandwidth

Where the time of a decoded token goes: kernels of experts, the rest of the model, waiting for
experts that nobody foresaw and for those on their way, and what banks take beside that. `simulated`
is what the simulator says of the same run, with the profile of this machine measured just before,
and the bandwidth that the contender's own link had: a shared disk does not keep to one.
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
from benchmarks import llama_mmap, timeline
from benchmarks.offload_contenders import CONTENDERS, Contender, new_contender, run_accelerate
from benchmarks.offload_plots import plot
from benchmarks.timing import machine, stamp, table
from benchmarks.widened import widen
from moecc.footprint import other_bytes
from moecc.generate import Timing, generate
from moecc.lenders import banks_of
from moecc.loading import demands_of
from moecc.profiling import measure as measure_profile
from moecc.runtime.offload.profile import LinkSpeed, Profile
from moecc.runtime.offload.recording import Pooled, Recording
from moecc.runtime.offload.replay import replay
from moecc.runtime.offload.simulate import GOVERNED, simulate
from moecc.runtime.offload.trace import Request
from moecc.runtime.offload.trial import MOST_TOKENS

REFERENCE = Path(__file__).parent / "reference"
PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form."


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender at one budget; times are milliseconds of a decoded token."""

    contender: str
    memory: str
    tokens_per_second: float
    spread: tuple[float, float] | None = None
    """The slowest round and the fastest."""
    hit_rate: float | None = None
    megabytes_per_token: float | None = None
    experts: float | None = None
    model: float | None = None
    demand_wait: float | None = None
    prefetch_wait: float | None = None
    overhead: float | None = None
    simulated: float | None = None
    """Tokens a second that the simulator says."""
    same_tokens: bool | None = None
    """As with all experts in memory."""


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", default="25%,50%", help="parts of the experts, in per cent")
    parser.add_argument("--widen", type=int, default=64, help="times the experts' size")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="some of them")
    parser.add_argument("--accelerate", action="store_true", help="time accelerate, too: slow")
    parser.add_argument("--llama", action="store_true", help="time llama.cpp, too: as root")
    parser.add_argument("--inner", default="inductor", help="compiles what is not MoE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    parser.add_argument("--timeline", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        profile, rows = measure(
            widen(REFERENCE, Path(folder) / "model", arguments.widen), arguments
        )
    results = [asdict(row) for row in rows]
    if arguments.json:
        record = {**stamp(), "widen": arguments.widen, "profile": asdict(profile)}
        arguments.json.write_text(json.dumps(record | {"results": results}, indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


def measure(folder: Path, arguments: argparse.Namespace) -> tuple[Profile, list[Row]]:
    """Time every contender at every budget, and print the tables."""
    model: Any = moecc.load(folder, expert_memory="100%")
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    options = {"inner": arguments.inner}
    model.forward = torch.compile(model.forward, backend="moecc", dynamic=True, options=options)
    generate(model, ids, arguments.new_tokens)  # compiles, and brings every expert in
    resident = [generate(model, ids, arguments.new_tokens) for _ in range(arguments.rounds)]
    whole = statistics.median(one.decode_rate for one in resident)
    profile = measure_profile(model, ids, arguments.new_tokens, "here")
    others = sum(one.nbytes for one in model.parameters() if one.stride()[0])  # no stand-ins
    stores = [bank.store for bank in banks_of(model)]
    demands = demands_of(model, stores)
    print(machine())
    print(
        f"{len(demands)} blocks of {demands[0].experts} experts, {demands[0].size / 1e6:.2f} MB "
        f"each, {sum(one.bytes for one in demands) / 1e6:.0f} MB; in memory {whole:.1f} tokens/s"
    )
    rows: list[Row] = []
    for memory in arguments.memory.split(","):
        slots = int(float(memory.rstrip("%")) / 100 * demands[0].experts)
        recording = Recording(
            model=folder.name,
            policy="lru",
            blocks=tuple(demands),
            pool_of=tuple(range(len(demands))),
            pools=(Pooled(slots=slots, asked=0, hits=0, predicted=0),) * len(demands),
            other_bytes=other_bytes(model),
            decode_rate=0.0,
            events=(),
        )
        contenders = [
            new_contender(name, stores, slots) for name in arguments.contenders.split(",")
        ]
        for _ in range(1 + arguments.rounds):
            for one in contenders:
                one.round(model, ids, arguments.new_tokens)
        found = [
            _row(one, memory, replace(recording, events=tuple(one.events)), profile, resident[0])
            for one in contenders
        ]
        budget = others + slots * sum(one.size for one in demands)
        if arguments.llama:
            found[:0] = _llama(folder, memory, budget, ids, arguments, resident[0])
        if arguments.accelerate:
            few = min(8, arguments.new_tokens)
            timing = run_accelerate(folder, budget, ids, few)
            same = timing.tokens == resident[0].tokens[:few]
            rate = timing.decode_rate
            row = Row(
                contender="accelerate", memory=memory, tokens_per_second=rate, same_tokens=same
            )
            found.insert(0, row)
        asked = replace(recording, events=tuple(contenders[0].events))
        found += _bounds(asked, memory, slots, profile, whole)
        _print(f"{memory}, {slots} slots", found)
        rows += found
        if arguments.timeline and memory == arguments.memory.split(",")[0]:
            _draw(contenders[-1], model, ids, arguments)
        for one in contenders:
            one.link.close()
    return profile, rows


def _row(
    contender: Contender, memory: str, recording: Recording, profile: Profile, resident: Timing
) -> Row:
    """Sum up the rounds of a contender."""
    rates = [one.decode_rate for one in contender.timings]
    calls = [call for call in contender.calls if call.tokens <= MOST_TOKENS]
    steps = sum(len(one.tokens) - 1 for one in contender.timings)
    counts = [bank.pool.trace.counts for bank in contender.banks]
    parts = {
        "experts": sum(call.compute for call in calls),
        "demand_wait": sum(call.demand_wait for call in calls),
        "prefetch_wait": sum(call.prefetch_wait for call in calls),
        "overhead": sum(call.overhead for call in calls),
    }
    seconds = sum(one.decode_seconds for one in contender.timings)
    parts["model"] = seconds - sum(parts.values())
    slots = [pool.slots for pool in recording.pools]
    simulated = None
    if contender.name != "no cache":
        predictions = GOVERNED if "prefetch" in contender.name else "none"
        policy = CONTENDERS[contender.name][0]
        bandwidth = contender.link.bandwidth or profile.link.bandwidth
        link = LinkSpeed(
            bandwidth=bandwidth, stream=min(bandwidth, profile.link.stream), latency=0.0
        )
        here = replace(profile, link=link)
        simulated = simulate(recording, here, slots, policy, predictions).decode_rate
    return Row(
        contender=contender.name,
        memory=memory,
        tokens_per_second=statistics.median(rates),
        spread=(min(rates), max(rates)),
        hit_rate=sum(one.hits for one in counts) / sum(one.experts for one in counts),
        megabytes_per_token=contender.read_bytes / (steps + len(rates)) / 1e6,
        **{name: took / steps * 1e3 for name, took in parts.items()},
        simulated=simulated,
        same_tokens=all(one.tokens == resident.tokens for one in contender.timings),
    )


def _llama(
    folder: Path,
    memory: str,
    budget: int,
    ids: torch.Tensor,
    arguments: argparse.Namespace,
    resident: Timing,
) -> list[Row]:
    """Time llama.cpp with so many bytes for all weights, or say why not."""
    try:
        made = llama_mmap.run(
            folder, budget, ids[0].tolist(), arguments.new_tokens, arguments.rounds
        )
    except RuntimeError as error:
        print(f"llama.cpp is left out: {error}")
        return []
    print(
        f"llama.cpp: {budget / 1e6:.0f} MB for weights, {made.own / 1e6:.0f} MB of its own, "
        f"{made.peak / 1e6:.0f} MB at most"
    )
    row = Row(
        contender="llama.cpp",
        memory=memory,
        tokens_per_second=made.rate,
        spread=(min(made.rates), max(made.rates)),
        megabytes_per_token=made.read / 1e6,
        same_tokens=made.tokens == tuple(resident.tokens),
    )
    return [row]


def _bounds(
    recording: Recording, memory: str, slots: int, profile: Profile, whole: float
) -> list[Row]:
    """Say what Belady and perfect predictions would give, simulated and by bytes alone."""
    blocks = range(len(recording.blocks))
    perfect = {"foreseen": "lfu", "oracle": "belady"}
    rates = {
        name: simulate(recording, profile, [slots] * len(blocks), policy, "perfect").decode_rate
        for name, policy in perfect.items()
    }
    decoding = [
        one for one in recording.events if isinstance(one, Request) and one.tokens <= MOST_TOKENS
    ]
    fewest = [
        replay([one for one in decoding if one.block == number], slots, "belady")
        for number in blocks
    ]
    read = sum(
        one.misses * demand.size for one, demand in zip(fewest, recording.blocks, strict=True)
    )
    steps = sum(one.block == 0 for one in decoding)
    bound = min(whole, profile.link.bandwidth * steps / read)
    hit_rate = sum(one.hits for one in fewest) / sum(one.asked for one in fewest)
    return [
        *(Row(contender=n, memory=memory, tokens_per_second=rate) for n, rate in rates.items()),
        Row(contender="bound", memory=memory, tokens_per_second=bound, hit_rate=hit_rate),
    ]


def _draw(contender: Contender, model: Any, ids: torch.Tensor, arguments: Any) -> None:
    """Generate once more, and write where the time went."""
    done = len(contender.calls)
    with timeline.watched(contender.banks) as spans:
        contender.round(model, ids, arguments.new_tokens)
    calls = contender.calls[done:]
    timeline.write([*spans, *timeline.spans_of(calls)], arguments.timeline)


def _print(title: str, rows: Sequence[Row]) -> None:
    base = next((row for row in rows if row.contender == "lru"), rows[0]).tokens_per_second
    parts = ("experts", "model", "demand_wait", "prefetch_wait", "overhead")
    lines = [[title, "tokens/s", "over lru", "hits", "MB/token", "simulated"]]
    lines[0] += [f"{part.replace('_', ' ')} ms" for part in parts]
    for row in rows:
        rate = row.tokens_per_second
        cells = (row.megabytes_per_token, row.simulated, *(getattr(row, part) for part in parts))
        hits = "" if row.hit_rate is None else f"{row.hit_rate:.1%}"
        lines.append([row.contender, f"{rate:.1f}", f"{rate / base:.2f}x", hits])
        lines[-1] += ["" if cell is None else f"{cell:.1f}" for cell in cells]
    print(f"\n{table(lines)}")
    different = [row.contender for row in rows if row.same_tokens is False]
    print(f"tokens differ: {different}" if different else "all gave the same tokens", flush=True)


if __name__ == "__main__":
    main()

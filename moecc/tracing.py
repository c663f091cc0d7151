"""Record what a run asks of its cache of experts: `moecc trace`."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from moecc.footprint import other_bytes
from moecc.generate import compiled, generate
from moecc.lenders import banks_of
from moecc.loading import demands_of
from moecc.plain import members
from moecc.prompted import load_prompted
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.policy import AUTO
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.recording import Pooled, Recording, write
from moecc.runtime.offload.trace import Counts, Event
from moecc.terminal import counting, live_line

_FEW = 4
"""New tokens that compile both graphs: a prefill and decoding steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A run that was recorded."""

    file: str
    model: str
    policy: str
    blocks: tuple[Demand, ...]
    """In the order of their numbers."""
    pool_of: tuple[int, ...]
    """For each block, whose slots it uses."""
    pools: tuple[Pooled, ...]
    other_bytes: int
    """Of weights beside the experts."""
    decode_rate: float
    """Tokens a second of the run, which began with empty slots."""
    events: int
    """Lines of the file after the first."""


def run(
    name: str,
    prompt: str,
    new_tokens: int,
    output: Path,
    options: dict[str, Any],
    dtype: str,
    quiet: bool,
) -> Traced:
    """Load with `moecc.load`, generate once, compiled, and write every event from the first.

    Raises what `load_prompted` does.
    """
    with live_line(f"loading {name}", quiet) as tell:
        loaded = load_prompted(name, prompt, new_tokens, dtype, options, tell)
        model, ids = loaded.model, loaded.ids
        with compiled(model, options):
            generate(model, ids, _FEW, counting(tell, _FEW, "compiling"))
            with recorded(model, name, options) as recording:
                timing = generate(model, ids, new_tokens, counting(tell, new_tokens, "tracing"))
    made = recording(timing.decode_rate)
    write(made, output)
    known: Any = {name: getattr(made, name) for name in members(Recording)}
    return Traced(**known | {"file": str(output), "events": len(made.events)})


@contextmanager
def recorded(
    model: nn.Module, name: str, options: dict[str, Any]
) -> Generator[Callable[[float], Recording]]:
    """Record what a model that `moecc.load` loaded asks of empty caches inside.

    Gives what makes the recording afterwards, of the measured tokens a second.
    """
    events: list[Event] = []
    pools = list(dict.fromkeys(bank.pool for bank in banks_of(model)))
    before = [replace(pool.trace.counts) for pool in pools]
    for pool in pools:
        with pool.lock:
            pool.cache.clear()
            pool.trace.recording, pool.trace.events = True, events  # one list: the order of all
    policy = options.get("policy", "auto")

    def make(decode_rate: float) -> Recording:
        banks = banks_of(model)
        return Recording(
            model=name,
            policy=AUTO if policy == "auto" else policy,
            blocks=tuple(demands_of(model, [bank.store for bank in banks])),
            pool_of=tuple(pools.index(bank.pool) for bank in banks),
            pools=tuple(map(_counted, pools, before)),
            other_bytes=other_bytes(model),
            decode_rate=decode_rate,
            events=tuple(events),
        )

    try:
        yield make
    finally:
        for pool in pools:
            pool.trace.recording, pool.trace.events = False, []


def _counted(pool: Pool, before: Counts) -> Pooled:
    """Say what a pool counted since."""
    after = pool.trace.counts
    return Pooled(
        slots=pool.slots,
        asked=after.experts - before.experts,
        hits=after.hits - before.hits,
        predicted=after.predicted - before.predicted,
    )


def print_traced(made: Traced, console: Console) -> None:
    """Say what was recorded and what to do with it."""
    asked = sum(pool.asked for pool in made.pools)
    hits = sum(pool.hits for pool in made.pools)
    slots = sorted({pool.slots for pool in made.pools})
    console.print(
        f"{made.events} events of {len(made.blocks)} blocks in {made.file!r}; "
        f"{hits} hits of {asked} with {slots} slots",
        markup=False,
        highlight=False,
    )
    console.print(f"moecc replay {made.file} tells what other settings would do", highlight=False)

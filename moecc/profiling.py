"""Measure what a simulation needs to know of this machine: `moecc profile`.

The link is timed with the engine's own readers, on a model's own files. How fast the model computes
is seen while it generates with every expert in memory. In every second token experts are computed
one by one: a kernel call of one expert and one of K tell a launch from an expert. One generation
has reads beside it.
"""

import statistics
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecc.checkpoint.folders import find_folder
from moecc.demo import check_length, counting, live_line
from moecc.footprint import other_bytes
from moecc.generate import compiled, generate
from moecc.lenders import banks_of, bound_to
from moecc.loading import load
from moecc.models import load_tokenizer
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.load import Load
from moecc.runtime.offload.profile import ComputeSpeed, LinkSpeed, Profile, write
from moecc.runtime.offload.record import new_records
from moecc.timed_bank import Call, TimedBank

_BATCH = 16
"""Experts that are read at once while the link is timed."""


def run(name: str, prompt: str, new_tokens: int, output: Path, dtype: str, quiet: bool) -> Profile:
    """Load with slots for all experts, measure, and write a profile.

    Raises what `moecc.load` does, and `ModelError` for a model without a tokenizer or with too
    short a context.
    """
    options: dict[str, Any] = {"expert_memory": "100%"}
    with live_line(f"loading {name}", quiet) as tell:
        folder = find_folder(name)
        tokenizer = load_tokenizer(str(folder))
        model = load(folder, dtype=dtype, **options)
        ids: torch.Tensor = tokenizer(prompt, return_tensors="pt").input_ids
        check_length(name, model, ids.shape[1] + new_tokens)
        with compiled(model, options):
            generate(model, ids, 4, counting(tell, 4, "compiling"))
            tell("measuring")
            made = measure(model, ids, new_tokens, f"here, with {folder.name}")
    write(made, output)
    return made


def measure(model: nn.Module, prompt: torch.Tensor, new_tokens: int, name: str) -> Profile:
    """Measure with a compiled model that `moecc.load` gave slots for all experts.

    `prompt` is [1, T] token ids.
    """
    banks = banks_of(model)
    link = _link_speed(banks)
    alone = _calls(model, prompt, new_tokens)
    with _reading(banks):
        beside = _calls(model, prompt, new_tokens)
    slower = _token_seconds(beside) / _token_seconds(alone)
    compute = _compute_speed(alone, banks, other_bytes(model) / len(banks), max(1.0, slower))
    return Profile(
        name=name,
        tier="memory ← disk",
        source="measured by moecc profile",
        link=link,
        compute=compute,
    )


def _calls(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> list[Call]:
    """Generate twice, and give the calls of the second time."""
    calls: list[Call] = []
    blocks = len(banks_of(model))
    generate(model, prompt, 2)  # brings every expert of the prompt in
    with bound_to(model, lambda bank: TimedBank(bank=bank, calls=calls, apart=blocks)):
        generate(model, prompt, new_tokens)
        calls.clear()
        generate(model, prompt, new_tokens)
    return calls


def _compute_speed(
    calls: Sequence[Call], banks: Sequence[Bank], others: float, slower: float
) -> ComputeSpeed:
    """Tell apart what calls took; `others` are bytes of weights between two blocks."""
    single = [call for call in calls if call.tokens == 1]
    whole = statistics.median(call.compute for call in single if len(call.kernels) == 1)
    one = statistics.median(
        call.compute / len(call.kernels) for call in single if len(call.kernels) > 1
    )
    active = max(call.experts for call in single)
    expert = (whole - one) / (active - 1) if active > 1 else whole
    bandwidth = banks[0].store.layout.size / expert
    prefill = [call for call in calls if call.tokens > 1]
    rows = statistics.median(call.tokens * active / call.experts for call in prefill)
    each = statistics.median(call.compute / call.experts for call in prefill)
    layer, token = _gaps(calls, len(banks))
    return ComputeSpeed(
        bandwidth=bandwidth,
        balance=rows / max(1.0, each / expert),
        launch=max(0.0, one - expert),
        call=statistics.median(call.overhead for call in single),
        layer=max(0.0, layer - others / bandwidth),
        token=max(0.0, token - layer),
        beside_reads=slower,
    )


def _gaps(calls: Sequence[Call], blocks: int) -> tuple[float, float]:
    """Give the seconds between two blocks of a token, and between two tokens."""
    layers: list[float] = []
    tokens: list[float] = []
    for before, after in pairwise(calls):
        if before.tokens == after.tokens == 1:
            (layers if after.block > before.block else tokens).append(after.start - before.end)
    return statistics.median(layers or [0.0]), statistics.median(tokens)


def _token_seconds(calls: Sequence[Call]) -> float:
    starts = [call.start for call in calls if call.block == 0 and call.tokens == 1]
    return statistics.median(b - a for a, b in pairwise(starts))


def _link_speed(banks: Sequence[Bank]) -> LinkSpeed:
    """Read experts of every block, many at once and one after another."""
    return LinkSpeed(
        bandwidth=statistics.median(_read(bank, Link(), _BATCH) for bank in banks),
        stream=statistics.median(_read(bank, Link(readers=1), 1) for bank in banks),
        latency=0.0,  # it is part of both
    )


def _read(bank: Bank, link: Link, at_once: int, least: float = 0.1) -> float:
    """Give the bytes a second of reading so many experts at a time, for a while."""
    store, count = bank.store, min(at_once, bank.store.experts)
    _, records = new_records(count, store.layout)

    def read(first: int) -> None:
        loads = [
            Load(store, (first + place) % store.experts, records[place]) for place in range(count)
        ]
        for one in loads:
            link.submit(one)
        for one in loads:
            link.wait(one)

    read(0)  # opens files, starts readers, brings memory in
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < least:
        done += count
        read(done)
    speed = done * store.layout.size / (time.perf_counter() - start)
    link.close()
    return speed


@contextmanager
def _reading(banks: Sequence[Bank]) -> Generator[None]:
    """Keep the link busy meanwhile."""
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            _read(banks[0], Link(), 4)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

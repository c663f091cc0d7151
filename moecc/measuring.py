"""Measure what a machine gives: contenders in turn, memory, products, reads of a store."""

import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from moecc.links import new_link
from moecc.runtime.offload.load import Load
from moecc.runtime.offload.record import new_records
from moecc.runtime.offload.store import Store


def machine() -> str:
    """Describe what was measured on, in one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        name = next((v.strip() for k, v in fields.items() if k.strip() == "model name"), name)
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, {isa}, torch {torch.__version__}"


def alternate(
    contenders: Mapping[str, Callable[[int], object]],
    *,
    seconds: float,
    most: int = 200,
    between: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Return the median seconds of a call of each contender, as `take_turns` times them."""
    taken = take_turns(contenders, seconds=seconds, most=most, between=between)
    return {name: statistics.median(times) for name, times in taken.items()}


def take_turns(
    contenders: Mapping[str, Callable[[int], object]],
    *,
    seconds: float,
    most: int = 200,
    between: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each call of each contender.

    Contenders are called in turn, so that a slow spell of the machine hits them alike; each gets
    about `seconds` in all, at least one call, at most `most`. A contender is given the number of
    the call, to pick its input by. The first call of each is not timed.

    With `between`, each timed call follows that and a call that is not timed: it is where threads
    of the contender before, which spin for work, are put to sleep.
    """
    first: dict[str, float] = {}
    for name, call in contenders.items():
        for _ in range(2):  # the second call of two is warm, and is only an estimate
            start = time.perf_counter()
            call(0)
            first[name] = time.perf_counter() - start
            if first[name] > seconds:
                break
    rounds = {name: int(max(1, min(most, seconds / took))) for name, took in first.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1, 1 + max(rounds.values())):
        for name, call in contenders.items():
            if number > rounds[name]:
                continue
            if between is not None:
                between()
                call(number - 1)
            start = time.perf_counter()
            call(number)
            taken[name].append(time.perf_counter() - start)
    return taken


PRODUCT = 2 * 2048**3
"""Floating-point operations of `plain_product`."""


def plain_read(size: int) -> Callable[[int], object]:
    """Read so many bytes of memory with all threads: other ones each call, of 1 GiB."""
    block = _block()

    def read(number: int) -> None:
        left, start = size // 4, number * (size // 4) % block.numel()
        while left > 0:
            part = block[start : start + left]
            part.sum()
            left, start = left - part.numel(), 0

    return read


def plain_product() -> Callable[[int], object]:
    """Multiply float32 matrices, 2048^3, with `torch.mm`."""
    a, b = torch.randn(2, 2048, 2048)
    return lambda _: a @ b


def read_bandwidth(seconds: float = 1.0) -> float:
    """Measure bytes a second of reading memory with all threads."""
    return 2**30 / alternate({"read": plain_read(2**30)}, seconds=seconds)["read"]


def product_rate(seconds: float = 1.0) -> float:
    """Measure floating-point operations a second of `plain_product`."""
    return PRODUCT / alternate({"mm": plain_product()}, seconds=seconds)["mm"]


def store_bandwidth(store: Store, at_once: int = 1, seconds: float = 0.1) -> float:
    """Measure bytes a second of reading experts past the page cache, so many at once."""
    link, (_, records) = new_link(at_once), new_records(at_once, store.layout)

    def read(first: int) -> None:
        loads = [
            Load(store, (first + number) % store.experts, record)
            for number, record in enumerate(records)
        ]
        for load in loads:
            link.submit(load)
        for load in loads:
            link.wait(load)

    read(0)  # opens the file, starts the readers, brings memory in
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += at_once
        read(count)
    speed = count * store.layout.size / (time.perf_counter() - start)
    link.close()
    return speed


@functools.cache
def _block() -> torch.Tensor:
    return torch.ones(1 << 28)

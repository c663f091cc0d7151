"""Say what a call of a CPU kernel is spent on, beside a plain read of the same bytes.

    python -m benchmarks.kernel_profile --kind int8,int4,mxfp4 --tokens 1 --isa avx2

Counters of the CPU are not to be had on many machines, so this measures by leaving things out. The
kernel's own source is built twice with `kernel_profile.h` in it: once its threads note when they
meet, once its products also only read what they would multiply, in their order. The same kernel is
also called with weights that stay in the cache (all rows have one address), where it only computes,
and for tokens without experts, where it only meets. All alternate, and each timed call follows
one that is not timed. A figure is the mean of the fastest quarter of the calls, so that the parts
of a call add up to it; calls that did without a thread (`docs/decisions/0009`) are left out.
"""

import argparse
import ctypes
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch

from benchmarks.kernels import (
    make_batch,
    our_call,
    our_spec,
    our_weights,
    random_weights,
)
from benchmarks.layer import DTYPES, SHAPES
from benchmarks.timing import machine, narrow_to, plain_read, table
from moecc.codegen.native import build, call
from moecc.codegen.native import emit as native
from moecc.codegen.spec import KernelSpec
from moecc.runtime.schemes.scheme import SCHEMES

STAMPS = 5
"""Of each thread: comes to a meeting and goes on, twice, and leaves."""
BATCHES = 11
"""Of tokens: calls take them in turn, so that weights come from memory."""
PARTS = ("around", "packing", "first", "second", "waiting", "meeting")
"""Of the time of a call."""
Call = Callable[..., object]
One = TypeVar("One")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Microseconds of a call, of its threads on average."""

    threads: int
    around: float
    """Python, the routing and memory, before and after the threads."""
    packing: float
    """Until threads have come and rounded the inputs."""
    first: float
    """In tasks of the first product."""
    second: float
    """In tasks of the second."""
    waiting: float
    """For the last thread to come to the meetings and to leave."""
    meeting: float
    """Until the last thread's coming is seen, and the region's end."""

    @property
    def whole(self) -> float:
        """Give the time of the call."""
        return sum(getattr(self, name) for name in PARTS)

    @property
    def products(self) -> float:
        """Give the time in tasks."""
        return self.first + self.second


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One kernel at one number of tokens."""

    kind: str
    tokens: int
    gigabytes: float
    """Of the active experts."""
    read: float
    """Microseconds of a plain read of so many bytes with all threads."""
    kernel: Spent
    reading: Spent
    """The kernel without arithmetic in its products."""
    cached: Spent
    """The kernel on weights that stay in the cache."""
    idle: Spent
    """The kernel without experts."""


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="qwen3-30b-a3b")
    parser.add_argument("--kind", default="bf16,int8,int4,mxfp4", help=f"of {[*DTYPES, *SCHEMES]}")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--calls", type=int, default=40, help="of each contender")
    parser.add_argument("--isa", choices=["avx2"], help="hold everything to this instruction set")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    narrow_to(arguments.isa)
    print(machine(), flush=True)
    profiles: list[Profile] = []
    for kind in arguments.kind.split(","):
        shown = [
            measure(kind, SHAPES[arguments.shape], tokens, arguments.calls)
            for tokens in map(int, arguments.tokens.split(","))
        ]
        profiles += shown
        print(f"\n{table(describe(shown))}", flush=True)
        if arguments.json:
            record = {"machine": machine(), "shape": arguments.shape}
            record |= {"results": [asdict(one) for one in profiles]}
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def measure(kind: str, shape: dict[str, int], tokens: int, calls: int) -> Profile:
    """Time a kernel, and what is left of it when things are left out."""
    spec = our_spec(kind, shape)
    held = our_weights(kind, random_weights(shape))
    batches = [make_batch(shape, tokens) for _ in range(BATCHES)]
    nobody = [(hidden, torch.full_like(ids, -1), shares) for hidden, ids, shares in batches]
    active = sum(ids.unique().numel() for _, ids, _ in batches) / BATCHES
    size = int(active * sum(one[0].nbytes for one in held))
    with stamping(spec) as stamps:
        whole, small = our_call(spec, held), our_call(spec, held)
    with stamping(spec, "#define READING\n") as reading_stamps:
        reading = our_call(spec, held)
    contenders = {
        "kernel": stamped(whole, batches, stamps),
        "reading": stamped(reading, batches, reading_stamps),
        "cached": in_cache(stamped(small, batches, stamps)),
        "idle": stamped(whole, nobody, stamps),
    }
    taken: dict[str, list[Spent]] = {name: [] for name in contenders}
    read, reads, numbers = plain_read(size), list[float](), itertools.count()
    with torch.inference_mode():
        for _ in range(calls):
            for name, run in contenders.items():
                run(next(numbers))
                taken[name].append(run(next(numbers)))
            read(next(numbers))
            start = time.perf_counter()
            read(next(numbers))
            reads.append((time.perf_counter() - start) * 1e6)
    spent = {name: fastest(all_calls) for name, all_calls in taken.items()}
    return Profile(
        kind=kind,
        tokens=tokens,
        gigabytes=size / 1e9,
        read=statistics.mean(_quarter(sorted(reads))),
        **spent,
    )


@contextmanager
def stamping(spec: KernelSpec, facts: str = "") -> Iterator[Callable[[], list[int]]]:
    """Let kernels that are built meanwhile note when their threads meet; gives the last call's."""
    part, source = native.template("experts.cpp"), native.write(spec)
    added = facts + Path(__file__).with_suffix(".h").read_text()
    source = source.replace(part, added + part)
    function = build.load(source).moecc_stamps
    times = (ctypes.c_int64 * (2 + STAMPS * torch.get_num_threads()))()

    def stamps() -> list[int]:
        return times[: 2 + STAMPS * function(times)]

    with mock.patch.object(native, "write", return_value=source):
        yield stamps


def stamped(
    run: Call, batches: list[tuple[torch.Tensor, ...]], stamps: Callable[[], list[int]]
) -> Callable[[int], Spent]:
    """Call a kernel and say what the call was spent on."""

    def timed(number: int) -> Spent:
        start = time.perf_counter_ns()
        run(*batches[number % len(batches)])
        whole = time.perf_counter_ns() - start
        began, ended, *times = stamps()
        return split(whole, began, ended, times)

    return timed


def split(whole: int, began: int, ended: int, times: list[int]) -> Spent:
    """Split the nanoseconds of a call by the stamps of its threads."""
    come, on, come_again, on_again, left = (times[at::STAMPS] for at in range(STAMPS))
    mean = statistics.mean
    arrivals = (come, come_again, left)
    waiting = sum(max(one) - mean(one) for one in arrivals)
    meeting = mean(on) - max(come) + mean(on_again) - max(come_again) + ended - max(left)
    return Spent(
        threads=len(left),
        around=(whole - (ended - began)) / 1e3,
        packing=(mean(come) - began) / 1e3,
        first=(mean(come_again) - mean(on)) / 1e3,
        second=(mean(left) - mean(on_again)) / 1e3,
        waiting=waiting / 1e3,
        meeting=meeting / 1e3,
    )


def in_cache(run: Callable[[int], Spent]) -> Callable[[int], Spent]:
    """Give all rows, or panels, of all experts one address."""

    def cached(number: int) -> Spent:
        with mock.patch.object(call, "_strides", return_value=(0, 0)):
            return run(number)

    return cached


def fastest(calls: list[Spent]) -> Spent:
    """Average the fastest calls of all threads."""
    threads = torch.get_num_threads()
    whole = [one for one in calls if one.threads == threads]
    if not whole:
        raise RuntimeError(
            f"no call had all {threads} threads: stop the process that keeps a core, and try again"
        )
    kept = _quarter(sorted(whole, key=lambda one: one.whole))
    means = (statistics.mean(getattr(one, name) for one in kept) for name in PARTS)
    return Spent(threads=threads, **dict(zip(PARTS, means, strict=True)))


def _quarter(ordered: list[One]) -> list[One]:
    return ordered[: max(1, len(ordered) // 4)]


def describe(profiles: list[Profile]) -> list[list[str]]:
    """List the parts of the time of kernels of one kind: those of each add up."""
    lines = [[profiles[0].kind, *(f"T={one.tokens}, us" for one in profiles)]]

    def line(name: str, part: Callable[[Profile], float]) -> None:
        lines.append([name, *(f"{part(one):.0f}" for one in profiles)])

    line("a plain read", lambda one: one.read)
    line("+ reading in the kernel's order", lambda one: one.reading.products - one.read)
    line("+ arithmetic beyond reading", lambda one: one.kernel.products - one.reading.products)
    line("+ waiting for the last thread", lambda one: one.kernel.waiting)
    line("+ waking and rounding inputs", lambda one: one.kernel.packing)
    line("+ meetings, the region's end", lambda one: one.kernel.meeting)
    line("+ Python, routing, memory", lambda one: one.kernel.around)
    line("= a call", lambda one: one.kernel.whole)
    lines.append(["of a plain read", *(f"{one.read / one.kernel.whole:.0%}" for one in profiles)])
    line("first product", lambda one: one.kernel.first)
    line("second product", lambda one: one.kernel.second)
    line("products alone, weights in cache", lambda one: one.cached.products)
    line("a call without experts", lambda one: one.idle.whole)
    return lines


if __name__ == "__main__":
    main()

"""Look at memory and measure it, and torch's products."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from moecc.doctor.check import Check, limited, ok
from moecc.measuring import machine, product_rate, read_bandwidth

_NEEDED = 3 << 30
"""What is read to measure, and room beside it."""
_SECONDS = 0.3


def memory() -> Iterator[Check]:
    """Check how much there is, and how fast it is read and matrices are multiplied."""
    yield ok("processor", machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores and torch.get_num_threads() > cores:
        fix = f"set OMP_NUM_THREADS={cores}: more threads than cores wait for each other"
        yield limited("threads", f"{torch.get_num_threads()} on {cores} cores", fix)
    total, free = memory_bytes()
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB available"
    if free < _NEEDED:
        fix = "close other programs; moecc.load(expert_memory=...) keeps experts on disk"
        yield limited("memory", f"{text}: too little to measure", fix)
        return
    rate = read_bandwidth(_SECONDS)
    yield ok("memory", f"{text}, read at {rate / 1e9:.1f} GB/s", measured=rate)
    flops = product_rate(_SECONDS)
    yield ok("products", f"{flops / 1e9:,.0f} GFLOP/s in float32", measured=flops)


def memory_bytes() -> tuple[int, int]:
    """Give all bytes that this process may have and those available, by the kernel and cgroup."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    info = Path("/proc/meminfo")
    if info.exists():  # what caches would give back is available, too
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        used = int((limit.parent / "memory.current").read_text())
        total, free = min(total, int(text)), min(free, int(text) - used)
    return total, free

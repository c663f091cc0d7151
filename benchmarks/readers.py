"""Time a link while the main thread sleeps and while it computes in Python, as a model's does.

    python -m benchmarks.readers --size 3.5 --json FILE

Experts of so many megabytes are read past the page cache, a few at once, by Python's reader threads
and by native ones (`docs/decisions/0035`), in turn. `busy` is a main thread that keeps the
interpreter's lock but for what the interpreter takes from it. Medians, in MB/s.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import machine, stamp, table
from moecc.links import new_link
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.load import Load
from moecc.runtime.offload.record import PAGE, Layout, new_records, up_to
from moecc.runtime.offload.store import Read, Store

LINKS: dict[str, Callable[[], Link]] = {"python": Link, "native": new_link}
AT_ONCE = 6


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=float, default=3.5, help="megabytes of an expert")
    parser.add_argument("--experts", type=int, default=200, help="in the file")
    parser.add_argument("--loads", type=int, default=100, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = write_store(Path(folder), arguments.experts, int(arguments.size * 1e6))
        rates: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for name, new in LINKS.items():
                for busy in (False, True):
                    found = rate(store, new(), arguments.loads, busy)
                    rates.setdefault(f"{name}, {'busy' if busy else 'idle'}", []).append(found)
    rows = [(name, f"{statistics.median(each) / 1e6:.0f}") for name, each in rates.items()]
    print(machine(), table([("readers, main thread", "MB/s"), *rows]), sep="\n")
    if arguments.json:
        record = {**stamp(), "size": arguments.size, "bytes_per_second": rates}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def write_store(folder: Path, experts: int, size: int) -> Store:
    """Write random experts, each at a whole page."""
    pitch, file = up_to(size, PAGE), folder / "experts.bin"
    with file.open("wb") as opened:
        for _ in range(experts):
            opened.write(random.randbytes(pitch))
    reads = tuple(
        (Read(file=file, offset=number * pitch, length=size, into=0),) for number in range(experts)
    )
    layout = Layout.of({"gate_up": ((size,), torch.uint8)})
    return Store(name="experts", layout=layout, reads=reads)


def rate(store: Store, link: Link, loads: int, busy: bool) -> float:
    """Read random experts, `AT_ONCE` under way, and give bytes a second."""
    memory, slots = new_records(AT_ONCE, store.layout)
    coming: list[Load] = []
    start = time.perf_counter()
    for number in range(loads):
        if number >= AT_ONCE:
            finish(link, coming[number - AT_ONCE], busy)
        coming.append(Load(store, random.randrange(store.experts), slots[number % AT_ONCE]))
        link.submit(coming[-1])
    for load in coming[-AT_ONCE:]:
        finish(link, load, busy)
    took = time.perf_counter() - start
    link.close()
    del memory
    return link.bytes / took


def finish(link: Link, load: Load, busy: bool) -> None:
    """See a load done, asleep or computing half a millisecond at a time."""
    while busy and not link.arrived(load):
        until = time.perf_counter() + 5e-4
        while time.perf_counter() < until:
            pass
    link.wait(load)


if __name__ == "__main__":
    main()

"""Experts in files that tests make, and a gate that reads have to pass."""

import os
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moecc.codegen.native.readers import load_readers
from moecc.runtime.offload import native_readers
from moecc.runtime.offload.link import Link, NewReaders
from moecc.runtime.offload.load import Load
from moecc.runtime.offload.native_readers import NativeReaders
from moecc.runtime.offload.python_readers import PythonReaders
from moecc.runtime.offload.record import Layout, new_records
from moecc.runtime.offload.store import Files, Read, Store

SIZE = 5000
"""Bytes of a record's data: neither whole pages nor whole chunks."""
KINDS: dict[str, NewReaders] = {
    "python": PythonReaders,
    "native": lambda limit, files: NativeReaders(load_readers(), limit, files),
}
"""Queues of readers, by name."""
WAIT = 20.0
"""Seconds after which a test gives up on an event that has to come."""


def write_store(
    folder: Path, experts: int = 4, size: int = SIZE, gap: int = 13, checksums: bool = False
) -> tuple[Store, list[torch.Tensor]]:
    """Write random experts into one file, `gap` bytes apart; give them too."""
    made = torch.Generator().manual_seed(1)
    data = [torch.randint(256, (size,), dtype=torch.uint8, generator=made) for _ in range(experts)]
    file = folder / "experts.bin"
    file.write_bytes(b"".join(bytes(gap) + one.numpy().tobytes() for one in data))
    layout = Layout.of({"gate_up": ((size,), torch.uint8)})
    reads = tuple(
        (Read(file=file, offset=number * (size + gap) + gap, length=size, into=0),)
        for number in range(experts)
    )
    padded = [one.numpy().tobytes() + bytes(layout.size - size) for one in data]
    sums = tuple(map(zlib.crc32, padded)) if checksums else None
    return Store(name="model.layers.3.experts", layout=layout, reads=reads, checksums=sums), data


def new_load(store: Store, expert: int, priority: int = 0) -> Load:
    return Load(store, expert, new_records(1, store.layout)[1][0], priority)


def fetch(link: Link, store: Store, expert: int) -> torch.Tensor:
    """Read one expert into a record of its own."""
    load = new_load(store, expert)
    link.submit(load)
    link.wait(load)
    return load.record[:SIZE]


class Gate:
    """Holds reads back, each until it is let through, and remembers their order."""

    def __init__(self, monkeypatch: Any) -> None:
        self.order: list[tuple[int, int]] = []
        """Offset in the file and length, as they arrived."""
        self._arrived = threading.Condition()
        self._passes = threading.Semaphore(0)
        self._open = False
        original = Files.read

        def read(files: Files, read: Read, record: torch.Tensor, start: int, length: int) -> None:
            with self._arrived:
                self.order.append((read.offset + start, length))
                self._arrived.notify_all()
            if not self._open:
                assert self._passes.acquire(timeout=WAIT)
            original(files, read, record, start, length)

        monkeypatch.setattr(Files, "read", read)
        monkeypatch.setattr(native_readers, "BY_HAND", True)

    def arrived(self, count: int) -> None:
        """Wait until so many reads have come to the gate."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.order) >= count, timeout=WAIT)

    def let(self, count: int) -> None:
        """Let so many reads through."""
        self._passes.release(count)

    def open(self) -> None:
        """Let everything through from now on."""
        self._open = True
        self._passes.release(1000)


def fail_reads(monkeypatch: Any, failures: Sequence[BaseException | None]) -> list[int]:
    """Let `os.preadv` fail as listed, in turn, and then work; count its calls."""
    left, calls = list(failures), [0]
    original = os.preadv

    def preadv(*args: Any) -> int:
        calls[0] += 1
        error = left.pop(0) if left else None
        if error is not None:
            raise error
        return original(*args)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(native_readers, "BY_HAND", True)
    return calls


def open_files() -> set[str]:
    """List the files under test folders that this process has open."""
    found: set[str] = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        if target.endswith((".bin", ".safetensors")):
            found.add(f"{entry.name} {target}")
    return found


def readers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("moecc-reader")]


def in_a_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Run in another thread; calling what is given back waits for the result."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> Any:
        thread.join(WAIT)
        assert not thread.is_alive()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    return result


def in_child(check: Any) -> int:
    """Fork, and give 0 if the check holds in the child."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

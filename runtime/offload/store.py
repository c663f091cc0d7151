"""Say where the bytes of a block's experts are, and read them past the page cache.

Direct I/O (`O_DIRECT`) keeps the cache of experts the only one: what the page cache would hold
twice is memory that experts could have. Where a file system has no direct I/O, reads are ordinary.
"""

import errno
import os
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moecc.runtime.errors import StoreError
from moecc.runtime.offload.record import PAGE, Layout, new_records, up_to


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Bytes of a file that belong at a place of a record."""

    file: Path
    offset: int
    length: int
    into: int
    """Bytes from the beginning of the record."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Store:
    """The experts of one block: on disk, or in host memory beside a device."""

    name: str
    """The block's path in the model, for messages."""
    layout: Layout
    reads: tuple[tuple[Read, ...], ...]
    """What makes the record of each expert."""
    checksums: tuple[int, ...] | None = None
    """crc32 of each expert's record; None where the files have none."""
    records: torch.Tensor | None = None
    """uint8 [E, size], if they are in memory; `reads` are empty then."""
    pinned: bool = False
    """A device can read `records` by itself."""

    @property
    def experts(self) -> int:
        """E."""
        return len(self.reads)

    def check(self, expert: int, record: torch.Tensor) -> None:
        """Raise `StoreError` if a record that was read is not the one that was written."""
        if self.checksums is None:
            return
        found = zlib.crc32(bytes_of(record))
        if found != self.checksums[expert]:
            first = self.reads[expert][0]
            raise StoreError(
                f"expert {expert} of {self.name!r} in {str(first.file)!r} at byte {first.offset} "
                f"has checksum {found:08x}, not {self.checksums[expert]:08x}: the file is damaged; "
                "pack it again"
            )


@dataclass(slots=True)
class Files:
    """Open files, each once, shared by threads; a forked child opens its own."""

    stamps: dict[Path, tuple[int, ...]] = field(default_factory=dict[Path, tuple[int, ...]])
    """What each file was when it was opened first; another file's bytes would be silent garbage."""
    _open: dict[Path, tuple[int, bool]] = field(default_factory=dict[Path, tuple[int, bool]])
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _buffers: threading.local = field(default_factory=threading.local)

    def read(self, read: Read, record: torch.Tensor, start: int, length: int) -> None:
        """Fill part of a record, uint8 [size]: `length` bytes of a read from its byte `start`.

        Raises `OSError` as the system does, `EOFError` when the file ends before, and `StoreError`
        when it is no longer the file that was opened first.
        """
        handle, direct = self.open(read.file)
        self._fill(handle, direct, read, record, start, length)
        self._check(read.file, handle)

    def _fill(
        self, handle: int, direct: bool, read: Read, record: torch.Tensor, start: int, length: int
    ) -> None:
        begin, into = read.offset + start, read.into + start
        target = record[into : into + length]
        if not direct:
            return _fill(handle, bytes_of(target), begin, length)
        first = begin // PAGE * PAGE
        whole = up_to(begin + length, PAGE) - first
        aligned = first == begin and whole == length and target.data_ptr() % PAGE == 0
        if aligned:
            return _fill(handle, bytes_of(target), begin, length, PAGE)
        buffer = self._buffer(whole)
        _fill(handle, bytes_of(buffer), first, begin + length - first, PAGE)
        target.copy_(buffer[begin - first : begin - first + length])
        return None

    def close(self) -> None:
        """Close every file; a later read opens it again."""
        with self._lock:
            for handle, _ in self._open.values():
                os.close(handle)
            self._open.clear()

    def close_copies(self) -> None:
        """Close a forked child's copies, whoever had the lock in the parent."""
        for handle, _ in self._open.values():
            os.close(handle)
        self._open.clear()

    def open(self, file: Path) -> tuple[int, bool]:
        """Give a file's number, and whether its reads are direct; raises as `read` does."""
        with self._lock:
            if file not in self._open:
                handle, direct = _open(file)
                try:
                    self.stamps.setdefault(file, _stamp(handle))
                    self._check(file, handle)
                except BaseException:  # not only `StoreError`: interrupts come here, too
                    os.close(handle)
                    raise
                self._open[file] = handle, direct
            return self._open[file]

    def _check(self, file: Path, handle: int) -> None:
        if _stamp(handle) != self.stamps[file]:
            raise StoreError(
                "the file was written to or replaced since it was opened; load the model again"
            )

    def _buffer(self, size: int) -> torch.Tensor:
        """Give this thread's page-aligned memory."""
        held: torch.Tensor | None = getattr(self._buffers, "held", None)
        if held is None or len(held) < size:
            layout = Layout.of({"gate_up": ((size,), torch.uint8)})
            held = self._buffers.held = new_records(1, layout)[1][0]
        return held[:size]


def opens_directly(file: Path) -> bool:
    """Tell whether the file system of a file has direct reads."""
    handle, direct = _open(file)
    os.close(handle)
    return direct


def _open(file: Path) -> tuple[int, bool]:
    """Open for direct reads if the file system has them."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC | direct), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(file, os.O_RDONLY | os.O_CLOEXEC), False


def _stamp(handle: int) -> tuple[int, ...]:
    """Say which file it is, and which version of it."""
    status = os.fstat(handle)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _fill(handle: int, memory: memoryview, offset: int, needed: int, unit: int = 1) -> None:
    """Read until `needed` bytes are there; a read may return fewer, and then goes on at a unit."""
    done = 0
    while done < needed:
        start = done // unit * unit
        count = os.preadv(handle, [memory[start:]], offset + start)
        if start + count <= done:
            raise EOFError(f"the file ends at byte {offset + done}")
        done = start + count


def bytes_of(memory: torch.Tensor) -> memoryview:
    """See contiguous uint8 memory as a buffer to read into."""
    array: Any = memory.numpy()
    return memoryview(array)

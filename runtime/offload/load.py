"""Follow one expert on its way into a slot, chunk by chunk."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from moecc.runtime.offload.store import Read, Store

CHUNK = 1 << 20
"""Bytes of one read: at 1 GB/s a demand waits at most a millisecond for each reader."""
DEMAND = 0
"""The priority of what somebody waits for; predictions have larger numbers."""

Chunk = tuple[Read, int, int]
"""A read, where a chunk of it begins, and its length."""


@dataclass(eq=False, slots=True)
class Load:
    """One expert on its way into a slot."""

    store: Store
    expert: int
    record: torch.Tensor
    """uint8 [size]: the slot."""
    priority: int = DEMAND
    error: Exception | None = None
    done: bool = False
    """Its bytes are there, or it failed, or was cancelled."""
    cancelled: bool = False
    arrival: threading.Lock = field(default_factory=threading.Lock)
    """Held until it is done: whoever waits tries to take it."""
    _left: list[Chunk] = field(default_factory=list[Chunk])
    _active: int = 0
    _again: bool = False
    """It was read twice because of its checksum."""

    def __post_init__(self) -> None:
        self.arrival.acquire()
        self.restart()

    @property
    def active(self) -> bool:
        """Somebody is reading a chunk of it."""
        return self._active > 0

    @property
    def failed(self) -> bool:
        """It will never be there."""
        return self.error is not None or self.cancelled

    def restart(self) -> None:
        """Begin with the first chunk; they are taken from the end of a list."""
        self._left, self._active = list(_chunks(self.store, self.expert))[::-1], 0

    @property
    def waits(self) -> bool:
        """There are chunks that nobody reads yet."""
        return bool(self._left) and not self.done

    def take(self) -> Chunk:
        """Give the next chunk to a reader."""
        self._active += 1
        return self._left.pop()

    def finish(self, error: Exception | None) -> bool:
        """Count a chunk as read; tell whether it was the last one on its way."""
        self._active -= 1
        if error is not None and self.error is None:
            self.error = error
            self._left.clear()
        return not self._active and not self._left

    def stop(self) -> None:
        """Drop the chunks that nobody reads yet."""
        self.cancelled = True
        self._left.clear()
        if not self._active:
            self.end()

    def end(self) -> None:
        """Be done, and let those go on that wait for it."""
        self.done = True
        with contextlib.suppress(RuntimeError):  # several may notice
            self.arrival.release()

    def wants_again(self) -> bool:
        """Tell, once, that the whole record may be read a second time."""
        first, self._again = not self._again, True
        return first

    def failure(self, problem: str, read: Read | None = None, start: int = 0) -> str:
        """Say which expert could not be read, from where, and why."""
        read = read or self.store.reads[self.expert][0]
        place = f"{str(read.file)!r} at byte {read.offset + start}"
        return f"cannot read expert {self.expert} of {self.store.name!r} from {place}: {problem}"


def _chunks(store: Store, expert: int) -> Iterator[Chunk]:
    for read in store.reads[expert]:
        for start in range(0, read.length, CHUNK):
            yield read, start, min(CHUNK, read.length - start)

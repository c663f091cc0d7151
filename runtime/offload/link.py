"""Move experts from disk into slots: the loads on their way, and the threads that read them."""

import contextlib
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence

import torch

from moecc.runtime.errors import StoreError
from moecc.runtime.offload.load import DEMAND, Load
from moecc.runtime.offload.python_readers import PythonReaders
from moecc.runtime.offload.readers import Readers, Span
from moecc.runtime.offload.record import Layout, new_records
from moecc.runtime.offload.store import Files

READERS = 4
"""Enough reads in flight for the queues of an SSD."""
_POLL = 0.02
"""Seconds at least between two looks at how busy a link is."""
_LOOK = 0.05
"""Seconds after which an interrupt is noticed while waiting."""

NewReaders = Callable[[float | None, Files], Readers]


class Link:
    """Reader threads, started with the first load, and again after `close` or in a forked child.

    With a `limit` in bytes a second it stands for a slower link: readers sleep until their bytes
    would have come through. A store in /dev/shm makes it one from memory to memory. For the ratio
    of compute to transfer that a GPU has, which computes an expert in g seconds behind a link of b
    bytes a second, where that takes c seconds here, the limit is `b * g / c`.
    """

    def __init__(
        self, readers: int = READERS, limit: float | None = None, new: NewReaders = PythonReaders
    ) -> None:
        self._count, self._new = readers, new
        self._readers = new(limit, Files())
        self._lock = threading.RLock()
        """Loads are put into readers that are not being closed, replaced or forked meanwhile."""
        self._before = self._paused_at = 0, 0.0
        """Bytes and seconds of readers that are closed, and of all when they paused."""
        self._busy, self._polled, self._busy_then = 0.0, time.perf_counter(), 0.0
        """Share of time lately, as of when, and the seconds until then."""
        self._closing = weakref.finalize(self, self._readers.close)
        _links.add(self)

    def new_slots(self, count: int, layout: Layout) -> tuple[mmap.mmap, torch.Tensor]:
        """Allocate slots, uint8 [count, size], and give what holds their memory."""
        return new_records(count, layout)

    def arrived(self, load: Load) -> bool:
        """Tell whether an expert is there, or will never be."""
        if not load.done:
            self._readers.look(load)
        return load.done

    def used(self, slots: Iterable[torch.Tensor]) -> None:
        """Do nothing: kernels that were called have read their slots."""

    def submit(self, load: Load) -> None:
        """Start reading an expert; if this raises, nobody reads it."""
        with self._lock:
            if self._readers.closed:
                self._begin_anew([], self._counts())
            self._start()
            try:
                self._readers.submit(load)
            except BaseException:  # an interrupt, perhaps when readers had it already
                if load in self._readers.left():
                    self.cancel([load])
                raise

    def promote(self, load: Load) -> None:
        """Let a load overtake those that are only predicted."""
        if load.priority != DEMAND:
            load.priority = DEMAND
            self._readers.promote(load)

    def wait(self, load: Load) -> None:
        """Wait until a load is done; somebody needs it, so it overtakes predictions.

        Raises `StoreError` naming file and expert if it failed.
        """
        self.promote(load)
        self._wait_for_end(load)
        if load.error is not None:
            raise load.error
        if load.cancelled:
            raise StoreError(load.failure("the cache was closed meanwhile"))

    def stop(self, loads: Sequence[Load]) -> None:
        """Begin no more chunks of loads that nobody needs; those under way end by themselves."""
        for load in loads:
            self._readers.stop(load)

    def cancel(self, loads: Sequence[Load]) -> None:
        """Stop loads that nobody needs; when this returns, nobody writes to their records."""
        self.stop(loads)
        for load in loads:
            self._wait_for_end(load)

    def _wait_for_end(self, load: Load) -> None:
        while not load.done:
            self._start()
            self._readers.look(load, _LOOK)

    def _start(self) -> None:
        with self._readers.lock:
            self._readers.start(self._count)

    def close(self) -> None:
        """Stop the readers and close the files; loads on their way are cancelled.

        The next load starts new ones.
        """
        with self._lock:
            self._readers.close()

    @property
    def limit(self) -> float | None:
        """Bytes a second at most; None is what the machine gives."""
        return self._readers.limit

    @limit.setter
    def limit(self, limit: float | None) -> None:
        self._readers.set_limit(limit)

    @property
    def readers(self) -> str:
        """Say what serves it: `native` or `python`."""
        return self._readers.kind

    @property
    def bytes(self) -> int:
        """Bytes read so far."""
        return self._counts()[0]

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second while something was being read; None before the first load."""
        read, seconds = self._counts()
        return read / seconds if read else None

    def busy(self) -> float:
        """Share of the latest time in which something was being read."""
        with self._lock:
            now, total = time.perf_counter(), self._counts()[1]
            elapsed = now - self._polled
            if elapsed > _POLL:
                share = min(1.0, (total - self._busy_then) / elapsed)
                self._busy += 0.2 * (share - self._busy)
                self._polled, self._busy_then = now, total
            return self._busy

    def _counts(self) -> tuple[int, float]:
        with self._lock:
            read, seconds = self._readers.counts()
            return self._before[0] + read, self._before[1] + seconds

    @contextlib.contextmanager
    def watched(self) -> Generator[list[Span]]:
        """Collect the chunks that are read inside, for a timeline; known at its end."""
        spans: list[Span] = []
        self._readers.watch()
        try:
            yield spans
        finally:
            spans += self._readers.seen()

    def pause(self) -> None:
        """Let readers end their chunks, and keep them from the next: nobody writes to a record."""
        self._lock.acquire()
        self._readers.pause()
        self._paused_at = self._counts()

    def resume(self) -> None:
        """Go on after `pause`."""
        try:
            self._readers.resume()
        finally:
            self._lock.release()

    def resume_in_child(self) -> None:
        """Go on after `pause` in a forked child, which has none of the threads."""
        self._lock = threading.RLock()
        loads = self._readers.left()
        for load in loads:
            load.done = load.done or load.cancelled
            load.restart()
        self._readers.abandon()
        self._begin_anew([load for load in loads if not load.done], self._paused_at)

    def _begin_anew(self, loads: Sequence[Load], counts: tuple[int, float]) -> None:
        self._closing.detach()
        new = self._new(self._readers.limit, Files(stamps=self._readers.files.stamps))
        self._readers, self._before = new, counts
        self._closing = weakref.finalize(self, self._readers.close)
        for load in loads:
            self._readers.submit(load)


_links: "weakref.WeakSet[Link]" = weakref.WeakSet()


_paused: list[Link] = []


def _pause_all() -> None:
    """Have no read under way in a fork: it could end up in either process's memory."""
    for link in list(_links):
        _paused.append(link)  # first: an interrupt must not leave it paused
        link.pause()


def _resume_all() -> None:
    while _paused:
        with contextlib.suppress(RuntimeError):  # an interrupt kept it from its lock
            _paused.pop().resume()


def _resume_all_in_child() -> None:
    _paused.clear()
    for link in list(_links):  # an interrupt may have left some that were not paused
        link.resume_in_child()


os.register_at_fork(
    before=_pause_all, after_in_parent=_resume_all, after_in_child=_resume_all_in_child
)

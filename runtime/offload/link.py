"""Move experts from disk into slots: the loads on their way, and the threads that read them."""

import mmap
import os
import time
import weakref
from collections.abc import Iterable, Sequence

import torch

from moecc.runtime.errors import StoreError
from moecc.runtime.offload.load import DEMAND, Load
from moecc.runtime.offload.readers import State, close, remove, start_readers
from moecc.runtime.offload.record import Layout, new_records
from moecc.runtime.offload.store import Files

READERS = 4
"""Enough reads in flight for the queues of an SSD."""
_POLL = 0.02
"""Seconds at least between two looks at how busy a link is."""


class Link:
    """Reader threads, started with the first load, and again after `close` or in a forked child.

    With a `limit` in bytes a second it stands for a slower link: readers sleep until their bytes
    would have come through. A store in /dev/shm makes it one from memory to memory. For the ratio
    of compute to transfer that a GPU has, which computes an expert in g seconds behind a link of b
    bytes a second, where that takes c seconds here, the limit is `b * g / c`.
    """

    def __init__(self, readers: int = READERS, limit: float | None = None) -> None:
        self._readers = readers
        self._state = State(limit=limit)
        self._closing = weakref.finalize(self, close, self._state)
        _links.add(self)

    def new_slots(self, count: int, layout: Layout) -> tuple[mmap.mmap, torch.Tensor]:
        """Allocate slots, uint8 [count, size], and give what holds their memory."""
        return new_records(count, layout)

    def arrived(self, load: Load) -> bool:
        """Tell whether an expert is there, or will never be."""
        return load.done

    def used(self, slots: Iterable[torch.Tensor]) -> None:
        """Do nothing: kernels that were called have read their slots."""

    def submit(self, load: Load) -> None:
        """Start reading an expert."""
        if self._state.closed:
            self._begin_anew([])
        state = self._state
        with state.lock:
            start_readers(state, self._readers)
            if not state.loads:
                state.since = time.perf_counter()
            state.loads.append(load)
            state.changed.notify_all()

    def promote(self, load: Load) -> None:
        """Let a load overtake those that are only predicted."""
        with self._state.lock:
            load.priority = DEMAND

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
        with self._state.lock:
            for load in loads:
                load.stop()
                if load.done:
                    remove(self._state, load)

    def cancel(self, loads: Sequence[Load]) -> None:
        """Stop loads that nobody needs; when this returns, nobody writes to their records."""
        self.stop(loads)
        for load in loads:
            self._wait_for_end(load)
        with self._state.lock:
            for load in loads:
                remove(self._state, load)

    def _wait_for_end(self, load: Load) -> None:
        """Wait without a condition: an interrupt must not leave a lock taken."""
        while not load.done:
            with self._state.lock:
                if not load.done:
                    start_readers(self._state, self._readers)
            if load.arrival.acquire(timeout=1.0):
                load.arrival.release()

    def close(self) -> None:
        """Stop the readers and close the files; loads on their way are cancelled.

        The next load starts new ones.
        """
        close(self._state)

    @property
    def limit(self) -> float | None:
        """Bytes a second at most; None is what the machine gives."""
        return self._state.limit

    @limit.setter
    def limit(self, limit: float | None) -> None:
        self._state.limit = limit

    @property
    def bytes(self) -> int:
        """Bytes read so far."""
        return self._state.bytes

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second while something was being read; None before the first load."""
        state = self._state
        with state.lock:
            running = time.perf_counter() - state.since if state.loads else 0.0
            seconds = state.seconds + running
            return state.bytes / seconds if state.bytes else None

    def busy(self) -> float:
        """Share of the latest time in which something was being read."""
        state = self._state
        with state.lock:
            now = time.perf_counter()
            total = state.seconds + (now - state.since if state.loads else 0.0)
            elapsed = now - state.polled
            if elapsed > _POLL:
                share = min(1.0, (total - state.busy_then) / elapsed)
                state.busy += 0.2 * (share - state.busy)
                state.polled, state.busy_then = now, total
            return state.busy

    def pause(self) -> None:
        """Let readers end their chunks, and keep them from the next: nobody writes to a record."""
        state = self._state
        state.changed.acquire()
        state.paused = True
        while any(load.active for load in state.loads):
            state.changed.wait(timeout=1.0)

    def resume(self) -> None:
        """Go on after `pause`."""
        state = self._state
        state.paused = False
        state.changed.notify_all()
        state.changed.release()

    def resume_in_child(self) -> None:
        """Go on after `pause` in a forked child, which has none of the threads."""
        state = self._state
        state.files.close_copies()
        for load in state.loads:
            load.done = load.done or load.cancelled
            load.restart()
        self._begin_anew([load for load in state.loads if not load.done])

    def _begin_anew(self, loads: list[Load]) -> None:
        self._closing.detach()
        old = self._state
        files = Files(stamps=old.files.stamps)
        self._state = State(
            files=files, loads=loads, limit=old.limit, bytes=old.bytes, seconds=old.seconds
        )
        self._state.since, self._state.busy_then = time.perf_counter(), old.seconds
        self._closing = weakref.finalize(self, close, self._state)


_links: "weakref.WeakSet[Link]" = weakref.WeakSet()


_paused: list[Link] = []


def _pause_all() -> None:
    """Have no read under way in a fork: it could end up in either process's memory."""
    _paused[:] = _links
    for link in _paused:
        link.pause()


def _resume_all() -> None:
    while _paused:
        _paused.pop().resume()


def _resume_all_in_child() -> None:
    while _paused:
        _paused.pop().resume_in_child()


os.register_at_fork(
    before=_pause_all, after_in_parent=_resume_all, after_in_child=_resume_all_in_child
)

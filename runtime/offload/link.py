"""Move experts from disk into slots with reader threads.

Loads are read in chunks. Before each chunk a thread takes the load of highest priority, so that an
expert that somebody waits for overtakes those that are only predicted, and a load that nobody wants
any more stops within a chunk.
"""

import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from moecc.runtime.errors import StoreError
from moecc.runtime.offload.store import Files, Read, Store

CHUNK = 1 << 20
"""Bytes of one read: at 1 GB/s a demand waits at most a millisecond for each reader."""
READERS = 4
"""Enough reads in flight for the queues of an SSD."""
_POLL = 0.02
"""Seconds at least between two looks at how busy a link is."""
DEMAND = 0
"""The priority of what somebody waits for; predictions have larger numbers."""


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
    _left: list[tuple[Read, int, int]] = field(default_factory=list[tuple[Read, int, int]])
    _active: int = 0
    _again: bool = False
    """It was read twice because of its checksum."""

    def __post_init__(self) -> None:
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

    def take(self) -> tuple[Read, int, int]:
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
        self.done = self.done or not self._active

    def wants_again(self) -> bool:
        """Tell, once, that the whole record may be read a second time."""
        first, self._again = not self._again, True
        return first


def _chunks(store: Store, expert: int) -> Iterator[tuple[Read, int, int]]:
    for read in store.reads[expert]:
        for start in range(0, read.length, CHUNK):
            yield read, start, min(CHUNK, read.length - start)


@dataclass(eq=False, slots=True)
class _State:
    """What readers share; they do not keep the link itself alive."""

    files: Files = field(default_factory=Files)
    changed: threading.Condition = field(default_factory=threading.Condition)
    loads: list[Load] = field(default_factory=list[Load])
    threads: list[threading.Thread] = field(default_factory=list[threading.Thread])
    closed: bool = False
    paused: bool = False
    """No chunk may be begun: the process is about to fork."""
    bytes: int = 0
    seconds: float = 0.0
    """Time in which at least one load was on its way."""
    since: float = 0.0
    busy: float = 0.0
    """Share of time, lately, as of `polled`; `busy_then` were the seconds at that time."""
    polled: float = field(default_factory=time.perf_counter)
    busy_then: float = 0.0


class Link:
    """Reader threads, started with the first load, and again after `close` or in a forked child."""

    def __init__(self, readers: int = READERS) -> None:
        self._readers = readers
        self._state = _State()
        self._closing = weakref.finalize(self, _close, self._state)
        _links.add(self)

    def submit(self, load: Load) -> None:
        """Start reading an expert."""
        if self._state.closed:
            self._begin_anew([])
        state = self._state
        with state.changed:
            _start_readers(state, self._readers)
            if not state.loads:
                state.since = time.perf_counter()
            state.loads.append(load)
            state.changed.notify_all()

    def promote(self, load: Load) -> None:
        """Let a load overtake those that are only predicted."""
        with self._state.changed:
            load.priority = DEMAND

    def wait(self, load: Load) -> None:
        """Wait until a load is done; somebody needs it, so it overtakes predictions.

        Raises `StoreError` naming file and expert if it failed.
        """
        state = self._state
        with state.changed:
            load.priority = DEMAND
            while not load.done:
                _start_readers(state, self._readers)
                state.changed.wait(timeout=1.0)
        if load.error is not None:
            raise load.error
        if load.cancelled:
            raise StoreError(_what(load, "the cache was closed meanwhile"))

    def cancel(self, load: Load) -> None:
        """Stop a load that nobody needs; when this returns, nobody writes to its record."""
        state = self._state
        with state.changed:
            load.stop()
            while not load.done:
                state.changed.wait(timeout=1.0)
            _remove(state, load)

    def close(self) -> None:
        """Stop the readers and close the files; loads on their way are cancelled.

        The next load starts new ones.
        """
        _close(self._state)

    @property
    def bytes(self) -> int:
        """Bytes read so far."""
        return self._state.bytes

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second while something was being read; None before the first load."""
        state = self._state
        with state.changed:
            running = time.perf_counter() - state.since if state.loads else 0.0
            seconds = state.seconds + running
            return state.bytes / seconds if state.bytes else None

    def busy(self) -> float:
        """Share of the latest time in which something was being read."""
        state = self._state
        with state.changed:
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
        self._state = _State(files=files, loads=loads, bytes=old.bytes, seconds=old.seconds)
        self._state.since, self._state.busy_then = time.perf_counter(), old.seconds
        self._closing = weakref.finalize(self, _close, self._state)


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


def _start_readers(state: _State, readers: int) -> None:
    """Replace readers that are missing; one is enough to go on with."""
    state.threads = [thread for thread in state.threads if thread.is_alive()]
    while len(state.threads) < readers and not state.closed:
        name = f"moecc-reader-{len(state.threads)}"
        thread = threading.Thread(target=_work, args=(state,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads
            if not state.threads:
                raise
            return
        state.threads.append(thread)


def _work(state: _State) -> None:
    """Read chunks until the link is closed; the last reader that leaves closes the files."""
    try:
        while (taken := _take(state)) is not None:
            load, chunk = taken
            error: Exception | None = StoreError(_what(load, "its reader thread died", *chunk[:2]))
            try:
                error = _read(state.files, load, chunk)
            finally:  # whatever happens here, nobody waits for ever
                _finish(state, load, chunk, error)
    finally:
        with state.changed:
            if threading.current_thread() in state.threads:
                state.threads.remove(threading.current_thread())
            if state.closed and not state.threads:
                state.files.close()


def _take(state: _State) -> tuple[Load, tuple[Read, int, int]] | None:
    """Wait for a chunk to read and give it with its load; None when the link is closed."""
    with state.changed:
        while not state.closed:
            waiting = (load for load in state.loads if load.waits and not state.paused)
            load = min(waiting, key=lambda load: load.priority, default=None)
            if load is not None:
                return load, load.take()
            state.changed.wait()
    return None


def _finish(state: _State, load: Load, chunk: tuple[Read, int, int], error: Exception | None):
    """Count a chunk, and end its load with the last one."""
    with state.changed:
        last = load.finish(error)
        state.bytes += chunk[2] if error is None else 0
        if state.paused:
            state.changed.notify_all()
    if not last:
        return
    again = _verify(load)
    with state.changed:
        if again and not load.cancelled:
            load.restart()
        else:
            load.done = True
            _remove(state, load)
        state.changed.notify_all()


def _read(files: Files, load: Load, chunk: tuple[Read, int, int]) -> Exception | None:
    """Read a chunk; an I/O error is tried once more, the end of a file is not."""
    read, start, length = chunk
    problem = ""
    for _ in range(2):
        try:
            files.read(read, load.record, start, length)
        except EOFError as error:
            problem = f"{error}, {read.offset + read.length} bytes are needed: it was truncated"
            break
        except OSError as error:
            problem = str(error)
        except StoreError as error:
            problem = str(error)
            break
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            break
        else:
            return None
    return StoreError(_what(load, problem, read, start))


def _verify(load: Load) -> bool:
    """Check a record that is complete; tell whether to read it again."""
    if load.error is not None or load.cancelled:
        return False
    try:
        load.store.check(load.expert, load.record)
    except StoreError as error:
        if load.wants_again():
            return True
        load.error = error
    except Exception as error:
        load.error = StoreError(_what(load, f"{type(error).__name__}: {error}"))
    return False


def _what(load: Load, problem: str, read: Read | None = None, start: int = 0) -> str:
    read = read or load.store.reads[load.expert][0]
    place = f"{str(read.file)!r} at byte {read.offset + start}"
    return f"cannot read expert {load.expert} of {load.store.name!r} from {place}: {problem}"


def _remove(state: _State, load: Load) -> None:
    if load in state.loads:
        state.loads.remove(load)
        if not state.loads:
            state.seconds += time.perf_counter() - state.since


def _close(state: _State) -> None:
    with state.changed:
        state.closed = True
        for load in state.loads:
            load.stop()
        state.changed.notify_all()
        readers = list(state.threads)
        if not readers:
            state.files.close()
    if threading.current_thread() not in readers:  # where garbage was collected
        for thread in readers:
            thread.join(timeout=5.0)

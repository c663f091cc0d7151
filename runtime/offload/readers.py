"""Read chunks in threads: what a link's readers do, and what they share.

Before each chunk a thread takes the load of highest priority, so that an expert that somebody waits
for overtakes those that are only predicted, and a load that nobody wants any more stops within a
chunk.
"""

import threading
import time
from dataclasses import dataclass, field

from moecc.runtime.errors import StoreError
from moecc.runtime.offload.load import Chunk, Load
from moecc.runtime.offload.store import Files


@dataclass(eq=False, slots=True)
class State:
    """What readers share; they do not keep the link itself alive."""

    files: Files = field(default_factory=Files)
    lock: threading.RLock = field(default_factory=threading.RLock)
    """What callers take: a condition is entered in Python, where interrupts leave it taken."""
    changed: threading.Condition = field(init=False)
    """Of the same lock; only readers wait for it, and they are never interrupted."""
    loads: list[Load] = field(default_factory=list[Load])
    threads: list[threading.Thread] = field(default_factory=list[threading.Thread])
    closed: bool = False
    paused: bool = False
    """No chunk may be begun: the process is about to fork."""
    limit: float | None = None
    """Bytes a second at most, of all readers together."""
    sent: float = 0.0
    """When the last chunk that was begun has passed a wire of that width."""
    bytes: int = 0
    seconds: float = 0.0
    """Time in which at least one load was on its way."""
    since: float = 0.0
    busy: float = 0.0
    """Share of time, lately, as of `polled`; `busy_then` were the seconds at that time."""
    polled: float = field(default_factory=time.perf_counter)
    busy_then: float = 0.0

    def __post_init__(self) -> None:
        self.changed = threading.Condition(self.lock)


def start_readers(state: State, readers: int) -> None:
    """Replace readers that are missing; one is enough to go on with."""
    state.threads = [thread for thread in state.threads if thread.is_alive()]
    while len(state.threads) < readers and not state.closed:
        name = f"moecc-reader-{len(state.threads)}"
        thread = threading.Thread(target=_work, args=(state,), name=name, daemon=True)
        state.threads.append(thread)  # before it starts: an interrupt must not lose a thread
        try:
            thread.start()
        except BaseException as error:
            if thread.ident is None:
                state.threads.remove(thread)
            if isinstance(error, RuntimeError) and state.threads:
                return  # the system has no more threads; those that there are go on
            raise


def _work(state: State) -> None:
    """Read chunks until the link is closed; the last reader that leaves closes the files."""
    try:
        while (taken := _take(state)) is not None:
            load, chunk = taken
            error: Exception | None = StoreError(load.failure("its reader thread died", *chunk[:2]))
            try:
                through = _enter(state, chunk[2])
                error = _read(state.files, load, chunk)
                time.sleep(max(0.0, through - time.perf_counter()))
            finally:  # whatever happens here, nobody waits for ever
                _finish(state, load, chunk, error)
    finally:
        with state.changed:
            if threading.current_thread() in state.threads:
                state.threads.remove(threading.current_thread())
            if state.closed and not state.threads:
                state.files.close()


def _take(state: State) -> tuple[Load, Chunk] | None:
    """Wait for a chunk to read and give it with its load; None when the link is closed."""
    with state.changed:
        while not state.closed:
            waiting = (load for load in state.loads if load.waits and not state.paused)
            load = min(waiting, key=lambda load: load.priority, default=None)
            if load is not None:
                return load, load.take()
            state.changed.wait()
    return None


def _enter(state: State, length: int) -> float:
    """Say when bytes that are sent now, behind those under way, will have passed the wire."""
    if state.limit is None:
        return 0.0
    with state.lock:
        state.sent = max(state.sent, time.perf_counter()) + length / state.limit
        return state.sent


def _finish(state: State, load: Load, chunk: Chunk, error: Exception | None):
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
            remove(state, load)
            load.end()
        state.changed.notify_all()


def _read(files: Files, load: Load, chunk: Chunk) -> Exception | None:
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
    return StoreError(load.failure(problem, read, start))


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
        load.error = StoreError(load.failure(f"{type(error).__name__}: {error}"))
    return False


def remove(state: State, load: Load) -> None:
    """Forget a load that is done."""
    if load in state.loads:
        state.loads.remove(load)
        if not state.loads:
            state.seconds += time.perf_counter() - state.since


def close(state: State) -> None:
    """Cancel what is on its way, and let the readers go."""
    with state.lock:
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

"""A queue of chunks in Python: what reads experts where nothing can build the native one.

A thread needs the interpreter's lock before each chunk, and may wait for it for milliseconds while
the model runs.
"""

import threading
import time

from moecc.runtime.offload.load import Chunk, Load
from moecc.runtime.offload.readers import Readers, died, read, verify
from moecc.runtime.offload.store import Files


class PythonReaders(Readers):
    """Threads that take chunks from a list."""

    kind = "python"

    def __init__(self, limit: float | None, files: Files) -> None:
        super().__init__(limit, files)
        self.changed = threading.Condition(self.lock)
        """Only readers wait for it, and they are never interrupted."""
        self._loads: list[Load] = []
        self._paused = False
        self._bytes, self._seconds, self._since = 0, 0.0, 0.0
        self._sent = 0.0
        """When the last chunk that was begun has passed a wire as wide as the limit."""

    def submit(self, load: Load) -> None:
        """Put a load into the queue."""
        with self.lock:
            if not self._loads:
                self._since = time.perf_counter()
            self._loads.append(load)
            self.changed.notify_all()

    def promote(self, load: Load) -> None:
        """Do nothing: readers look at the load's own priority."""

    def stop(self, load: Load) -> None:
        """Begin no more chunks of a load."""
        with self.lock:
            load.stop()
            if load.done:
                self._remove(load)

    def left(self) -> list[Load]:
        """Give what is not done."""
        return list(self._loads)

    def counts(self) -> tuple[int, float]:
        """Give bytes, and the seconds in which at least one load was on its way."""
        with self.lock:
            running = time.perf_counter() - self._since if self._loads else 0.0
            return self._bytes, self._seconds + running

    def pause(self) -> None:
        """Let chunks under way end, and begin no other; the lock is held until `resume`."""
        self.changed.acquire()
        self._paused = True
        while any(load.active for load in self._loads):
            self.changed.wait(timeout=1.0)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False
        self.changed.notify_all()
        self.changed.release()

    def work(self) -> None:
        """Read chunks until the queue is closed."""
        while (taken := self._take()) is not None:
            load, chunk = taken
            error: Exception | None = died(load, chunk)
            try:
                through = self._enter(chunk[2])
                with self.noted(load, chunk):
                    error = read(self.files, load, chunk)
                time.sleep(max(0.0, through - time.perf_counter()))
            finally:  # whatever happens here, nobody waits for ever
                self._finish(load, chunk, error)

    def drop(self) -> None:
        """Close the queue, and begin no more of what it holds."""
        for load in self._loads:
            load.stop()
        self.changed.notify_all()

    def _take(self) -> tuple[Load, Chunk] | None:
        """Wait for a chunk to read and give it with its load; None when the queue is closed."""
        with self.changed:
            while not self.closed:
                waiting = (load for load in self._loads if load.waits and not self._paused)
                load = min(waiting, key=lambda load: load.priority, default=None)
                if load is not None:
                    return load, load.take()
                self.changed.wait()
        return None

    def _enter(self, length: int) -> float:
        """Say when bytes that are sent now, behind those under way, will have passed the wire."""
        if self.limit is None:
            return 0.0
        with self.lock:
            self._sent = max(self._sent, time.perf_counter()) + length / self.limit
            return self._sent

    def _finish(self, load: Load, chunk: Chunk, error: Exception | None) -> None:
        """Count a chunk, and end its load with the last one."""
        with self.changed:
            last = load.finish(error)
            self._bytes += chunk[2] if error is None else 0
            if self._paused:
                self.changed.notify_all()
        if not last:
            return
        again = verify(load)
        with self.changed:
            if again and not load.cancelled:
                load.restart()
            else:
                self._remove(load)
                load.end()
            self.changed.notify_all()

    def _remove(self, load: Load) -> None:
        """Forget a load that is done."""
        if load in self._loads:
            self._loads.remove(load)
            if not self._loads:
                self._seconds += time.perf_counter() - self._since

"""The threads that read for a link, and what they do for one chunk.

Before each chunk a thread takes the load of highest priority, so that an expert that somebody waits
for overtakes those that are only predicted, and a load that nobody wants any more stops within a
chunk. The queue is in Python (`python_readers.py`), or in C++ where there is a compiler
(`native_readers.py`).
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moecc.runtime.errors import StoreError
from moecc.runtime.offload.load import Chunk, Load
from moecc.runtime.offload.store import Files


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A chunk that was read, in seconds of `time.perf_counter`."""

    thread: str
    file: Path
    offset: int
    length: int
    start: float
    end: float


class Readers(ABC):
    """Threads and the queue that they serve; they do not keep a link alive."""

    kind: ClassVar[str]

    def __init__(self, limit: float | None, files: Files) -> None:
        self.limit, self.files = limit, files
        self.threads: list[threading.Thread] = []
        self.closed = False
        self.lock = threading.RLock()
        """What callers take: a condition is entered in Python, where interrupts leave it taken."""
        self._spans: list[Span] | None = None

    @abstractmethod
    def submit(self, load: Load) -> None:
        """Put a load into the queue."""

    @abstractmethod
    def promote(self, load: Load) -> None:
        """Take note that a load's priority is another one."""

    @abstractmethod
    def stop(self, load: Load) -> None:
        """Begin no more chunks of a load."""

    @abstractmethod
    def left(self) -> list[Load]:
        """Give what is not done."""

    @abstractmethod
    def counts(self) -> tuple[int, float]:
        """Give bytes, and the seconds in which at least one load was on its way."""

    @abstractmethod
    def pause(self) -> None:
        """Let chunks under way end, and begin no other."""

    @abstractmethod
    def resume(self) -> None:
        """Go on after `pause`."""

    @abstractmethod
    def work(self) -> None:
        """Read chunks until the queue is closed: what each thread does."""

    @abstractmethod
    def drop(self) -> None:
        """Close the queue, and begin no more of what it holds."""

    def look(self, load: Load, wait: float = 0.0) -> None:
        """See whether a load is done, for so many seconds at most.

        Without a condition: an interrupt must not leave a lock taken.
        """
        if wait and load.arrival.acquire(timeout=wait):
            load.end()  # again, for the next one who waits

    def set_limit(self, limit: float | None) -> None:
        """Move so many bytes a second at most, with all threads together."""
        self.limit = limit

    def leave(self) -> None:
        """Close the files: no thread is left."""
        self.files.close()

    def abandon(self) -> None:
        """Be of no more use, in a forked child: it has none of the threads."""
        self.files.close_copies()

    def watch(self) -> None:
        """Note the chunks that are read from now on."""
        self._spans = []

    def seen(self) -> list[Span]:
        """Give the chunks that were read since, and note no more."""
        spans, self._spans = self._spans or [], None
        return spans

    @contextmanager
    def noted(self, load: Load, chunk: Chunk) -> Generator[None]:
        """Read a chunk inside."""
        start = time.perf_counter()
        yield
        if self._spans is not None:
            read, begin, length = chunk
            self._spans.append(
                Span(
                    thread=threading.current_thread().name,
                    file=read.file,
                    offset=read.offset + begin,
                    length=length,
                    start=start,
                    end=time.perf_counter(),
                )
            )

    def start(self, count: int) -> None:
        """Replace threads that are missing; one is enough to go on with."""
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        while len(self.threads) < count and not self.closed:
            name = f"moecc-reader-{len(self.threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            self.threads.append(thread)  # before it starts: an interrupt must not lose a thread
            try:
                thread.start()
            except BaseException as error:
                if thread.ident is None:
                    self.threads.remove(thread)
                if isinstance(error, RuntimeError) and self.threads:
                    return  # the system has no more threads; those that there are go on
                raise

    def close(self) -> None:
        """Cancel what is on its way, and let the threads go."""
        with self.lock:
            self.closed = True
            self.drop()
            threads = list(self.threads)
            if not threads:
                self.leave()
        if threading.current_thread() not in threads:  # where garbage was collected
            for thread in threads:
                thread.join(timeout=5.0)

    def _run(self) -> None:
        """Work; the last thread that leaves a closed queue closes the files."""
        try:
            self.work()
        finally:
            with self.lock:
                if threading.current_thread() in self.threads:
                    self.threads.remove(threading.current_thread())
                if self.closed and not self.threads:
                    self.leave()


def read(files: Files, load: Load, chunk: Chunk) -> Exception | None:
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


def died(load: Load, chunk: Chunk) -> StoreError:
    """Say what happened when a thread ends in the middle of a chunk."""
    return StoreError(load.failure("its reader thread died", *chunk[:2]))


def verify(load: Load) -> bool:
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

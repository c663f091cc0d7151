"""A queue of chunks in C++, whose threads need the interpreter's lock only when something is odd.

`codegen/native/readers.cpp` has the queue. A thread comes back to Python with a chunk that it could
not read, which is tried once more and explained here, and with a record whose checksum is wrong.
"""

import ctypes
import itertools
from pathlib import Path
from typing import Any

from moecc.runtime.errors import StoreError
from moecc.runtime.offload import load as loads
from moecc.runtime.offload.load import Chunk, Load
from moecc.runtime.offload.readers import Readers, Span, died, read, verify
from moecc.runtime.offload.store import Files

BY_HAND = False
"""Let Python read every chunk: where each is to be watched."""
_NOBODY = -1
"""What readers.cpp calls the file of ranges that Python reads."""
_CLOSED, _READ = 0, 1
"""Why a thread comes back; otherwise a record has to be checked."""


class _File(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("handle", "direct", "device", "inode", "size", "modified")
    ]


class _Range(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("file", "offset", "length", "into")]


class _Task(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("load", "range", "start", "length")),
        ("through", ctypes.c_double),
    ]


class _Span(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("thread", "file", "offset", "length")),
        *((name, ctypes.c_double) for name in ("start", "end")),
    ]


class NativeReaders(Readers):
    """Threads that serve a queue of `library`, which is readers.cpp built."""

    kind = "native"

    def __init__(self, library: ctypes.CDLL, limit: float | None, files: Files) -> None:
        super().__init__(limit, files)
        self._library = _typed(library)
        self._queue = ctypes.c_void_p(library.moecc_readers_new(limit or 0.0))
        self._files: dict[Path, int] = {}
        """What the queue calls them."""
        self._numbers: dict[Load, int] = {}
        """What it calls loads that nobody has seen done."""
        self._loads: dict[int, Load] = {}
        self._next = itertools.count()

    def __del__(self) -> None:
        """Free the queue; each thread that served it has held these readers."""
        if self._queue:
            self._library.moecc_readers_free(self._queue)

    def submit(self, load: Load) -> None:
        """Put a load into the queue."""
        reads, sums = load.store.reads[load.expert], load.store.checksums
        ranges = [_Range(self._file(one.file), one.offset, one.length, one.into) for one in reads]
        number = next(self._next)
        self._loads[number], self._numbers[load] = load, number
        self._library.moecc_readers_submit(
            self._queue, number, load.priority, load.record.data_ptr(), len(load.record),
            -1 if sums is None else sums[load.expert], len(ranges), (_Range * len(ranges))(*ranges),
            loads.CHUNK,
        )  # fmt: skip

    def promote(self, load: Load) -> None:
        """Take note that a load's priority is another one."""
        if (number := self._numbers.get(load)) is not None:
            self._library.moecc_readers_promote(self._queue, number, load.priority)

    def stop(self, load: Load) -> None:
        """Begin no more chunks of a load."""
        if (number := self._numbers.get(load)) is not None:
            load.cancelled = True
            self._library.moecc_readers_stop(self._queue, number)
            self.look(load)

    def look(self, load: Load, wait: float = 0.0) -> None:
        """See whether a load is done, for so many seconds at most."""
        if (number := self._numbers.get(load)) is None:  # of readers before these
            super().look(load, wait)
        elif self._library.moecc_readers_done(self._queue, number, wait):
            load.end()
            self._numbers.pop(load, None)
            self._loads.pop(number, None)

    def left(self) -> list[Load]:
        """Give what nobody has seen done."""
        return list(self._numbers)

    def counts(self) -> tuple[int, float]:
        """Give bytes, and the seconds in which at least one load was on its way."""
        counts = (ctypes.c_double * 2)()
        self._library.moecc_readers_counts(self._queue, counts)
        return int(counts[0]), counts[1]

    def pause(self) -> None:
        """Let chunks under way end, and begin no other; see what is done."""
        self._library.moecc_readers_pause(self._queue)
        for load in self.left():
            self.look(load)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._library.moecc_readers_resume(self._queue)

    def work(self) -> None:
        """Serve the queue until it is closed."""
        task = _Task()
        while (why := self._library.moecc_readers_work(self._queue, task)) != _CLOSED:
            load = self._loads[task.load]
            if why == _READ:
                self._read(load, task)
            else:
                self._check(load, task)

    def drop(self) -> None:
        """Close the queue, and begin no more of what it holds."""
        for load in self.left():
            self.look(load)
            load.cancelled |= not load.done
        self._library.moecc_readers_close(self._queue)

    def set_limit(self, limit: float | None) -> None:
        """Move so many bytes a second at most, with all threads together."""
        super().set_limit(limit)
        self._library.moecc_readers_limit(self._queue, limit or 0.0)

    def leave(self) -> None:
        """Close the files, and end what nobody has seen done: no thread is left."""
        super().leave()
        for load in self.left():
            self.look(load)

    def abandon(self) -> None:
        """Leave the queue as it is: to free it is to wait for its threads."""
        super().abandon()
        self._queue = None

    def watch(self) -> None:
        """Note the chunks that are read from now on."""
        super().watch()
        self._library.moecc_readers_watch(self._queue, True)

    def seen(self) -> list[Span]:
        """Give the chunks that were read since, and note no more."""
        self._library.moecc_readers_watch(self._queue, False)
        count: int = self._library.moecc_readers_seen(self._queue, 0, None)
        spans: Any = (_Span * count)()
        self._library.moecc_readers_seen(self._queue, count, spans)
        names = {thread.ident: thread.name for thread in self.threads}
        files = list(self._files)
        return super().seen() + [
            Span(
                thread=names.get(one.thread, "moecc-reader"),
                file=files[int(one.file)],
                offset=one.offset,
                length=one.length,
                start=one.start,
                end=one.end,
            )
            for one in spans
        ]

    def _file(self, file: Path) -> int:
        """Say what the queue calls a file; opening it again will say why it cannot be."""
        if BY_HAND:
            return _NOBODY
        if file not in self._files:
            try:
                handle, direct = self.files.open(file)
            except (OSError, StoreError):
                return _NOBODY
            opened = _File(handle, direct, *self.files.stamps[file])
            self._files[file] = self._library.moecc_readers_open(self._queue, opened)
        return self._files[file]

    def _read(self, load: Load, task: _Task) -> None:
        """Read a chunk that a thread did not."""
        number: int = task.range
        chunk: Chunk = load.store.reads[load.expert][number], task.start, task.length
        error: Exception | None = died(load, chunk)
        try:
            with self.noted(load, chunk):
                error = read(self.files, load, chunk)
        finally:  # whatever happens here, nobody waits for ever
            load.error = load.error or error
            if self._library.moecc_readers_finish(self._queue, task, error is not None):
                self._check(load, task)

    def _check(self, load: Load, task: _Task) -> None:
        """Check a whole record."""
        again = verify(load) and not load.cancelled
        self._library.moecc_readers_checked(self._queue, task, again, loads.CHUNK)


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions of readers.cpp, in their order there."""
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    task, file = ctypes.POINTER(_Task), ctypes.POINTER(_File)
    kinds: dict[str, tuple[Any, ...]] = {
        "new": (pointer, real),
        "free": (None, pointer),
        "open": (number, pointer, file),
        "submit": (
            None, pointer, number, number, pointer, number, number, number,
            ctypes.POINTER(_Range), number,
        ),
        "promote": (None, pointer, number, number),
        "stop": (None, pointer, number),
        "done": (number, pointer, number, real),
        "finish": (number, pointer, task, number),
        "checked": (None, pointer, task, number, number),
        "work": (number, pointer, task),
        "watch": (None, pointer, number),
        "seen": (number, pointer, number, ctypes.POINTER(_Span)),
        "limit": (None, pointer, real),
        "counts": (None, pointer, ctypes.POINTER(real)),
        "pause": (None, pointer),
        "resume": (None, pointer),
        "close": (None, pointer),
    }  # fmt: skip
    for name, (result, *arguments) in kinds.items():
        function = library[f"moecc_readers_{name}"]
        function.restype, function.argtypes = result, arguments
        setattr(library, f"moecc_readers_{name}", function)
    return library

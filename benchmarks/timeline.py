"""Write what happens while experts come from disk as a timeline for Perfetto (ui.perfetto.dev).

One track shows the blocks and the kernels in them, one the waits, and one each reader's chunks.
"""

import json
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.store import Files
from moecc.timed_bank import Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that took a while, in seconds of `time.perf_counter`."""

    track: str
    name: str
    start: float
    end: float


@contextmanager
def watched(banks: Sequence[Bank]) -> Generator[list[Span]]:
    """Collect reads of all links, and waits of these banks' pools, inside."""
    spans: list[Span] = []

    def timed(work: Callable[..., Any], track: str, name: Callable[..., str]) -> Callable[..., Any]:
        @wraps(work)
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                where = track or threading.current_thread().name
                spans.append(
                    Span(track=where, name=name(*arguments), start=start, end=time.perf_counter())
                )

        return run

    def of_read(_: Files, read: Any, *rest: Any) -> str:
        return f"{rest[-1]} bytes of {read.file.name} from {read.offset + rest[-2]}"

    reading = timed(Files.read, "", of_read)
    pools = list({id(bank.pool): bank.pool for bank in banks}.values())
    with patch.object(Files, "read", reading):
        for pool in pools:
            pool.wait = timed(pool.wait, "wait", lambda key: f"block {key[0]} expert {key[1]}")
        try:
            yield spans
        finally:
            for pool in pools:
                del pool.wait


def spans_of(calls: Sequence[Call]) -> list[Span]:
    """Show blocks, and the kernels in them."""
    spans: list[Span] = []
    for call in calls:
        name = f"block {call.block}, {call.tokens} tokens, {call.experts} experts"
        spans.append(Span(track="model", name=name, start=call.start, end=call.end))
        spans += [Span(track="model", name="kernel", start=a, end=b) for a, b in call.kernels]
    return spans


def write(spans: Sequence[Span], file: Path) -> None:
    """Write spans in Chrome's trace event format."""
    tracks = sorted({span.track for span in spans}, key=lambda name: (name != "model", name))
    begin = min((span.start for span in spans), default=0.0)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": track}}
        for number, track in enumerate(tracks)
    ]
    events += [
        {
            "ph": "X",
            "name": span.name,
            "pid": 0,
            "tid": tracks.index(span.track),
            "ts": (span.start - begin) * 1e6,
            "dur": (span.end - span.start) * 1e6,
        }
        for span in spans
    ]
    file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")

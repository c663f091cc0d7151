"""Write what happens while experts come from disk as a timeline for Perfetto (ui.perfetto.dev).

One track shows the blocks and the kernels in them, one the waits, and one each reader's chunks.
"""

import json
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.policy import Key
from moecc.runtime.offload.readers import Span as Chunk
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
    """Collect reads of these banks' links, and waits of their pools, inside."""
    spans: list[Span] = []
    reads: list[Iterable[Chunk]] = []
    pools = {id(bank.pool): bank.pool for bank in banks}.values()
    links = {id(pool.link): pool.link for pool in pools}.values()
    with ExitStack() as stack:
        reads += [stack.enter_context(one.watched()) for one in links if isinstance(one, Link)]
        for pool in pools:
            stack.enter_context(patch.object(pool, "wait", timed(pool.wait, spans)))
        yield spans
    for one in chain(*reads):
        name = f"{one.length} bytes of {one.file.name} from {one.offset}"
        spans.append(Span(track=one.thread, name=name, start=one.start, end=one.end))


def timed(wait: Callable[[Key], None], spans: list[Span]) -> Callable[[Key], None]:
    """Note how long waiting for an expert takes."""

    def run(key: Key) -> None:
        start = time.perf_counter()
        try:
            wait(key)
        finally:
            name = f"block {key[0]} expert {key[1]}"
            spans.append(Span(track="wait", name=name, start=start, end=time.perf_counter()))

    return run


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

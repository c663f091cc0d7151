"""Watch a graph being compiled: what is done now, how far that is, what it took."""

import resource
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, time_ns
from typing import Any, Literal

from torch.fx import GraphModule

Compiler = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A graph that the inner backend compiled."""

    name: str
    """A callee's, that of what lies between callees, or `graph` for a whole one."""
    nodes: int
    seconds: float
    eager: float | None = None
    """The share of a call that it is, if it is so small that it runs as it is (`inner="auto"`)."""


@dataclass(slots=True, kw_only=True)
class Watch:
    """The inner backend, and what it has compiled of one of Dynamo's graphs."""

    inner: str
    compiler: Compiler
    auto: bool = False
    """Pieces that hardly count may run as they are."""
    tracing: float | None = field(default_factory=lambda: _traced())
    """Seconds that Dynamo took to the graph; None where torch does not say."""
    resident: float = field(default_factory=lambda: _resident())
    """GB of the process before the passes."""
    peak: float = 0.0
    """The most GB that the process has had in its life, when the last piece was compiled."""
    pieces: list[Piece] = field(default_factory=list[Piece])
    _tell: Callable[[str], None] = lambda _: None

    @contextmanager
    def telling(self, progress: bool | Literal["auto"]) -> Generator[None]:
        """Show a line on stderr meanwhile: if it is a terminal, or if that was asked for."""
        terminal = sys.stderr is not None and sys.stderr.isatty()
        if not (terminal if progress == "auto" else progress):
            yield
        elif not terminal:
            self._tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: T201
            yield
        else:
            from moecc.terminal import live_line  # rich, which only a terminal needs

            with live_line("compiling a graph") as self._tell:
                yield

    def compile(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        name: str = "graph",
        ahead: Sequence[int] = (),
        eager: float | None = None,
    ) -> Callable[..., Any]:
        """Have a piece compiled; `ahead` are the nodes of each that is still to come.

        One that is said to be so small a share of a call as `eager` is left as it is.
        """
        nodes = len(gm.graph.nodes)
        self._tell(self._line(name, nodes, ahead))
        start = perf_counter()
        compiled = self.compiler(gm, inputs) if eager is None else gm.forward
        took = perf_counter() - start
        self.pieces.append(Piece(name=name, nodes=nodes, seconds=took, eager=eager))
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        self.peak = max(self.resident, most)  # the kernel's two counts differ by some pages
        return compiled

    def _line(self, name: str, nodes: int, ahead: Sequence[int]) -> str:
        done = len(self.pieces)
        text = f"{self.inner} compiles {name}, {nodes} nodes, {done + 1} of {done + 1 + len(ahead)}"
        if not done:
            return text
        rate = sum(one.seconds for one in self.pieces) / sum(one.nodes for one in self.pieces)
        return f"{text}, about {rate * (nodes + sum(ahead)):.0f} s left"


def _traced() -> float | None:
    """Give the time since Dynamo began with what it traces now, from its own metrics."""
    from torch._dynamo.utils import get_metrics_context  # reports are read without Dynamo

    began: int | None = getattr(get_metrics_context(), "_start_time_ns", None)
    return (time_ns() - began) / 1e9 if began else None


def _resident() -> float:
    """Give the GB of memory that the process has now; 0 where /proc does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / 1e9

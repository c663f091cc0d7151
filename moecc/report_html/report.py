"""Gather everything that `moecc report` shows, and write it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moecc import __version__, planning
from moecc.inspection import Inspection
from moecc.passes.ir import MoeBlock
from moecc.passes.options import parse_memory
from moecc.report_html import caching, graphs, planned, roofline, routing, summary
from moecc.report_html.caching import Caching
from moecc.report_html.graphs import Change, Graphs
from moecc.report_html.page import Section, command, page
from moecc.report_html.planned import Planned
from moecc.report_html.roofline import Roofline
from moecc.report_html.routing import Routing
from moecc.reporting import GraphReport, graph_report
from moecc.runtime.errors import OptionError
from moecc.runtime.offload import recording
from moecc.runtime.offload.profile import Profile
from moecc.runtime.offload.recording import Recording

MOST_MACHINES = 4
"""That pictures have colours for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What the pages' pictures show."""

    model: str
    notes: tuple[str, ...]
    """What the graphs do not show."""
    graphs: tuple[GraphReport, ...]
    changes: Graphs
    rooflines: tuple[Roofline, ...]
    planned: Planned | None
    """With a budget of memory."""
    routing: Routing | None
    """With a trace."""
    caching: Caching | None
    trace: str
    """The file, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the pictures show, for programs."""

    model: str
    version: str
    """Of moecc."""
    torch: str
    notes: tuple[str, ...]
    graphs: tuple[GraphReport, ...]
    changes: tuple[Change, ...]
    rooflines: tuple[Roofline, ...]
    plan: Planned | None
    routing: Routing | None
    cache: Caching | None


def told(data: Data) -> Told:
    """Leave pictures out."""
    return Told(
        model=data.model,
        version=__version__,
        torch=torch.__version__,
        notes=data.notes,
        graphs=data.graphs,
        changes=tuple(one.change for one in data.changes.changes),
        rooflines=data.rooflines,
        plan=data.planned,
        routing=data.routing,
        cache=data.caching,
    )


def gather(
    seen: Inspection,
    profiles: Sequence[Profile],
    *,
    memory: str = "",
    trace: str = "",
    quantize: str = "",
    dtype: str = "auto",
) -> Data:
    """Draw what was compiled, plan for its MODEL and read its trace.

    Raises `OptionError` for a budget that is too small and a trace of another model, `StoreError`
    for a file that is no trace.
    """
    model = seen.name
    blocks = {one.path: one for record in seen.records for one in record.blocks}
    recorded = recording.read(Path(trace)) if trace else None
    if recorded:
        _check(recorded, list(blocks.values()), trace)
    plan = None
    if (budget := parse_memory(memory or None)) is not None:
        plan = planning.run(model, budget, profiles, quantize or None, trace or None, dtype)
    return Data(
        model=model,
        notes=tuple(map(str, seen.folded)),
        graphs=tuple(map(graph_report, seen.records)),
        changes=graphs.gather(model, seen.records),
        rooflines=roofline.gather(list(blocks.values()), profiles),
        planned=plan and planned.gather(plan, profiles),
        routing=recorded and routing.gather(recorded),
        caching=recorded and caching.gather(recorded),
        trace=trace,
    )


def _check(recorded: Recording, blocks: Sequence[MoeBlock], trace: str) -> None:
    """Raise `OptionError` for a trace of a model with other blocks."""
    theirs = sorted({block.experts for block in recorded.blocks})
    ours = sorted({block.experts for block in blocks})
    if theirs != ours:
        raise OptionError(
            f"the trace {trace!r} is of {recorded.model!r}, whose blocks have {theirs} experts; "
            f"this model's have {ours}: record one of its own with moecc trace"
        )


def html(data: Data) -> str:
    """Write the page."""
    sections = [summary.section(data.model, data.notes, data.graphs), graphs.section(data.changes)]
    sections += [roofline.section(data.rooflines)] if data.rooflines else []
    sections += [planned.section(data.planned)] if data.planned else []
    sections += [routing.section(data.routing)] if data.routing else []
    sections += [caching.section(data.caching, data.trace)] if data.caching else []
    if missing := _missing(data):
        sections.append(Section(key="absent", title="Not in this report", html=missing))
    loads = {"loads": data.routing.loads, "names": data.routing.names} if data.routing else {}
    return page(
        f"moecc report: {data.model}",
        f"moecc {__version__} · torch {torch.__version__}",
        sections,
        {"walk": graphs.walk(data.changes), **loads},
    )


def _missing(data: Data) -> str:
    """Name the commands that give what is not there."""
    again = f"moecc report {data.model} -o report.html"
    lines = ""
    if data.planned is None:
        lines += command(f"{again} --memory 25%", "What fits a budget of memory, and how fast:")
    if data.routing is None:
        trace = f'moecc trace {data.model} -p "some text" -o t.jsonl --expert-memory 25%'
        lines += command(trace, "Expert load and the cache need a checkpoint's trace:")
        lines += command(f"{again} --trace t.jsonl", "and then")
    return lines

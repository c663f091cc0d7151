"""Show the graph before and after each pass that changed it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from moecc.passes.pipeline import Step
from moecc.passes.text import graph_diff
from moecc.records import Record
from moecc.report_html.grouping import focus, group, groups_in
from moecc.report_html.listing import Line, changed, parse, with_bodies
from moecc.report_html.page import Section, command, details
from moecc.report_html.pictures import draw

_MOST_LINES = 600
"""Of a diff; `moecc passes --diff` prints the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A graph that can be walked through: place → number of a picture."""

    views: Mapping[tuple[str, ...], int]
    focus: tuple[str, ...]
    """The place that is shown first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one pass did to one graph."""

    graph: int
    name: str
    """The pass's."""
    nodes: tuple[int, int]
    """Before and after."""
    diff: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A change that can be looked at."""

    change: Change
    before: Side
    after: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """Every pass that changed a graph, and all pictures, each once."""

    model: str
    changes: tuple[Drawn, ...]
    pictures: tuple[str, ...]
    """SVG."""


def gather(model: str, records: Sequence[Record]) -> Graphs:
    """Draw all graphs; records have to keep their text."""
    pictures: dict[str, int] = {}
    changes: list[Drawn] = []
    for number, record in enumerate(records):
        blocks = {
            one.path: f"MoE: {one.experts} experts, top-{one.active}" for one in record.blocks
        }
        steps = [step for step in record.steps if step.before != step.after]
        changes += [_draw(number, step, blocks, pictures) for step in steps]
    return Graphs(model=model, changes=tuple(changes), pictures=tuple(pictures))


def _draw(graph: int, step: Step, blocks: Mapping[str, str], pictures: dict[str, int]) -> Drawn:
    before, after = parse(step.before), parse(step.after)
    return Drawn(
        change=Change(
            graph=graph,
            name=step.name,
            nodes=(step.nodes_before, step.nodes_after),
            diff=graph_diff(step.before, step.after, step.name),
        ),
        before=_side(before, changed(before, after), blocks, pictures),
        after=_side(after, changed(after, before), blocks, pictures),
    )


def _side(
    lines: tuple[Line, ...],
    altered: frozenset[str],
    blocks: Mapping[str, str],
    pictures: dict[str, int],
) -> Side:
    """Draw every place of a graph; `pictures` takes those that are new."""
    readers: defaultdict[str, list[str]] = defaultdict(list)
    every = with_bodies(lines)
    for line in every:
        for name in line.inputs:
            readers[name].append(line.name)
    by_name, root = {line.name: line for line in every}, group(lines, altered)
    views = {
        place: pictures.setdefault(draw(one, by_name, readers, blocks), len(pictures))
        for place, one in groups_in(root).items()
    }
    return Side(views=views, focus=focus(root))


def section(graphs: Graphs) -> Section:
    """Write the pictures, their templates and the diffs."""
    if not graphs.changes:
        return Section(key="graphs", title="Graphs", html="<p>No pass changed a graph.</p>")
    several = len({one.change.graph for one in graphs.changes}) > 1
    tabs = "".join(
        f'<button role="tab" data-pass="{at}">{escape(one.change.name)}'
        f"{f' <small>graph {one.change.graph}</small>' if several else ''}</button>"
        for at, one in enumerate(graphs.changes)
    )
    panes = "".join(_pane(at, one.change, graphs.model) for at, one in enumerate(graphs.changes))
    templates = "".join(
        f'<template id="picture-{number}">{svg}</template>'
        for number, svg in enumerate(graphs.pictures)
    )
    told = (
        "<p>Each pass that changed the graph, before and after. Boxes with a count of nodes open: "
        "modules of the model, MoE blocks coloured, neighbours that compute alike folded into one "
        "(×n shows the first). What the pass took away is red, what it wrote is green. Choose any "
        "box to read its line.</p>"
    )
    html = f'{told}<div class="tabs" role="tablist">{tabs}</div>{panes}{templates}'
    return Section(key="graphs", title="Graphs", html=html)


def _pane(at: int, one: Change, model: str) -> str:
    sides = "".join(
        f'<figure class="side" data-side="{name}"><figcaption>{name} '
        f"<small>{nodes} nodes</small> <em></em>"
        '</figcaption><div class="stage"></div></figure>'
        for name, nodes in zip(("before", "after"), one.nodes, strict=True)
    )
    lines = one.diff.splitlines()
    more = len(lines) - _MOST_LINES
    rest = command(f"moecc passes {model} --diff {one.name}", f"{more} more lines:")
    text = "".join(
        f'<span class="{_KINDS.get(line[:1], "same")}">{escape(line)}\n</span>'
        for line in lines[:_MOST_LINES]
    )
    diff = f"<pre class=diff>{text}</pre>{rest if more > 0 else ''}"
    return (
        f'<div class="pane" data-pane="{at}" hidden><nav class="crumbs" aria-label="place"></nav>'
        f'<div class="sides">{sides}</div><pre class="chosen" aria-live="polite">choose a box</pre>'
        f"{details(f'diff of the text, {len(lines)} lines', diff)}</div>"
    )


_KINDS = {"+": "add", "-": "del", "@": "at"}


def walk(graphs: Graphs) -> list[dict[str, Any]]:
    """Give the script what opens to which picture, for each pass and side."""

    def side(one: Side) -> dict[str, Any]:
        views = [[list(place), view] for place, view in one.views.items()]
        return {"views": views, "focus": one.focus}

    return [{"before": side(one.before), "after": side(one.after)} for one in graphs.changes]

"""Show what was found, what was done about it, and what was left alone."""

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from moecc.report_html.page import Section, command, details, table, tiles
from moecc.reporting import GraphReport


def section(model: str, notes: Sequence[str], graphs: Sequence[GraphReport]) -> Section:
    """Write figures, the passes, blocks, kernels and misses of all graphs."""
    blocks = {block["path"]: block for graph in graphs for block in graph.blocks}
    passes = [step for graph in graphs for step in graph.passes]
    misses = [miss for graph in graphs for miss in graph.misses]
    fallbacks = sum(miss["fallback"] for miss in misses)
    figures = tiles(
        [
            ("MoE blocks", len(blocks), "" if blocks else "bad"),
            ("graphs", len(graphs), ""),
            ("rewrites", sum(step["rewrites"] for step in passes), ""),
            ("left alone", len(misses) - fallbacks, ""),
            ("fallbacks", fallbacks, "bad" if fallbacks else ""),
            ("ms in passes", f"{sum(step['milliseconds'] for step in passes):.0f}", ""),
        ]
    )
    parts = [figures, *(f"<p>Note: {escape(note)}</p>" for note in notes)]
    parts += ["<h3>Passes</h3>", _passes(graphs)]
    if blocks:
        parts += ["<h3>MoE blocks</h3>", _blocks(list(blocks.values()))]
    parts += ["<h3>Kernels</h3>", _kernels(graphs)] if blocks else []
    parts += [*_misses(misses), command(f"moecc why {model}", "More on each block:")]
    return Section(key="summary", title="Summary", html="".join(parts))


def _passes(graphs: Sequence[GraphReport]) -> str:
    """Write a table for each graph; of several all but the first are folded away."""
    heads = ("pass", "rewrites", "nodes before", "after", "ms", "")
    tables = [
        table(
            heads,
            [
                (
                    step["name"], step["rewrites"] or "–", step["nodes_before"],
                    step["nodes_after"], f"{step['milliseconds']:.1f}", step["note"],
                )
                for step in graph.passes
            ],
        )
        for graph in graphs
    ]  # fmt: skip
    if len(tables) == 1:
        return tables[0]
    return "".join(details(f"graph {at}", one, not at) for at, one in enumerate(tables))


def _blocks(blocks: Sequence[dict[str, Any]]) -> str:
    sizes = ("experts", "active", "hidden_size", "intermediate")
    described = [
        (
            block["path"], block["style"], block["source"], *(block[name] for name in sizes),
            block["dtype"], block["activation"],
            block["router"]["text"] if block["router"] else "not described",
            block["shared"]["text"] if block["shared"] else "none",
        )
        for block in blocks
    ]  # fmt: skip
    heads = (
        "block", "style", "source", "E", "K", "H", "I", "dtype", "activation", "router",
        "shared expert",
    )  # fmt: skip
    return table(heads, _alike(described))


def _kernels(graphs: Sequence[GraphReport]) -> str:
    used = Counter(
        one[key]
        for graph in graphs
        for one, key in (
            *((block, "kernel") for block in graph.blocks),
            *((block, "router_kernel") for block in graph.blocks),
            *((one, "kernel") for one in (*graph.attentions, *graph.linears)),
        )
        if one[key]
    )
    return table(("kernel", "calls"), list(used.items()))


def _misses(misses: Sequence[dict[str, Any]]) -> list[str]:
    if not misses:
        return ["<h3>Left alone</h3><p>Nothing: every block was raised as far as was asked.</p>"]
    rows = [
        (miss["where"], miss["why"], "fallback" if miss["fallback"] else "", miss["source"])
        for miss in misses
    ]
    return ["<h3>Left alone</h3>", table(("where", "why", "", "source"), _alike(rows))]


def _alike(rows: Sequence[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Put rows together that differ in their first cell alone."""
    firsts: dict[tuple[object, ...], list[object]] = {}
    for first, *rest in rows:
        firsts.setdefault(tuple(rest), []).append(first)
    return [
        (f"{one} and {len(more)} more" if more else one, *rest)
        for rest, (one, *more) in firsts.items()
    ]

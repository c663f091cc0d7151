"""Show what was found, what was done about it, and what was left alone."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from moecc.report_html.page import Section, command, table, tiles
from moecc.reporting import GraphReport


def section(model: str, graphs: Sequence[GraphReport]) -> Section:
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
    parts = [figures, "<h3>Passes</h3>", _passes(graphs)]
    if blocks:
        parts += ["<h3>MoE blocks</h3>", _blocks(list(blocks.values()))]
    parts += ["<h3>Kernels</h3>", _kernels(graphs)] if blocks else []
    parts += [*_misses(misses), command(f"moecc why {model}", "More on each block:")]
    return Section(key="summary", title="Summary", html="".join(parts))


def _passes(graphs: Sequence[GraphReport]) -> str:
    rows = [
        (
            *((number,) if len(graphs) > 1 else ()),
            step["name"],
            step["rewrites"] or "–",
            step["nodes_before"],
            step["nodes_after"],
            f"{step['milliseconds']:.1f}",
            step["note"],
        )
        for number, graph in enumerate(graphs)
        for step in graph.passes
    ]
    heads = ("pass", "rewrites", "nodes before", "after", "ms", "")
    return table((*(("graph",) if len(graphs) > 1 else ()), *heads), rows)


def _blocks(blocks: Sequence[dict[str, Any]]) -> str:
    """Write a row for all blocks that are alike."""
    sizes = ("experts", "active", "hidden_size", "intermediate")
    paths: dict[tuple[object, ...], list[str]] = {}
    for block in blocks:
        described = (
            block["style"], block["source"], *(block[name] for name in sizes), block["dtype"],
            block["activation"], block["router"]["text"] if block["router"] else "not described",
            block["shared"]["text"] if block["shared"] else "none",
        )  # fmt: skip
        paths.setdefault(described, []).append(block["path"])
    rows = [
        (f"{first} and {len(more)} more" if more else first, *described)
        for described, (first, *more) in paths.items()
    ]
    heads = (
        "block", "style", "source", "E", "K", "H", "I", "dtype", "activation", "router",
        "shared expert",
    )  # fmt: skip
    return table(heads, rows)


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
    rows = Counter(
        (miss["where"], miss["why"], "fallback" if miss["fallback"] else "", miss["source"])
        for miss in misses
    )
    heads = ("where", "why", "", "source")
    return ["<h3>Left alone</h3>", table(heads, list(rows))]

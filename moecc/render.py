"""Write reports and tables of passes as text for people."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moecc.lenders import ExpertsReport
from moecc.parallel import ShareReport
from moecc.reporting import GraphReport, Report
from moecc.terminal import WIDTH


def report_text(report: Report) -> str:
    """Write a report as text, without colours."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False)
    print_report(report, console)
    return out.getvalue().rstrip() + "\n"


def print_report(report: Report, console: Console) -> None:
    """Print a report to a terminal or a file: graphs, their blocks and kernels, other roads."""
    console.print(f"moecc {report.version} · torch {report.torch}")
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    if report.graphs:
        console.print(_graphs(report.graphs))
        _print_found(report.graphs, console)
    if report.eager:
        eager = report.eager
        console.print(
            f"outside torch.compile: {eager.modules} experts modules, {eager.calls} calls by "
            f"moecc's kernels, {eager.own_calls} by the model's own code"
        )
        _print_list(eager.kernels, console)
        _print_list(eager.reasons, console)
    if report.experts:
        print_experts(report.experts, console)
    if report.parallel:
        print_shares(report.parallel, console)
    for one in report.speculation:
        print_speculation(one, console)


def print_experts(experts: ExpertsReport, console: Console) -> None:
    """Print where experts live and how often they were there when asked for."""
    table = Table("experts of", "schemes", box=None, pad_edge=False)
    for name in ("slots", "MB", "asked", "hits", "late", "misses", "guessed", "waited"):
        table.add_column(name, justify="right")
    for block in experts.blocks:
        rate = f"{block['hits'] / block['asked']:.1%}" if block["asked"] else "–"
        slots = f"{block['slots']}/{block['experts']}"
        size = f"{block['slots'] * block['slot_bytes'] / 1e6:.1f}"
        counts = (block["asked"], rate, block["late"], block["misses"])
        guessed = "–" if block["recall"] is None else f"{block['recall']:.0%}"
        cells = (slots, size, *map(str, counts), guessed, f"{block['wait_seconds']:.2f} s")
        table.add_row(block["path"], block["schemes"] or "", *cells)
    console.print(table)
    console.print(
        f"{experts.memory_bytes / 1e6:,.1f} of {experts.total_bytes / 1e6:,.1f} MB of experts in "
        f"memory, {experts.hit_rate:.1%} of those asked for were there or on their way"
    )
    if experts.read_bandwidth:
        by = "by Python threads, for want of a C++ compiler, " * (experts.readers == "python")
        console.print(
            f"{experts.read_bytes / 1e6:,.1f} MB read from disk {by}at "
            f"{experts.read_bandwidth / 1e6:,.0f} MB/s"
        )
    if experts.guesses and experts.guesses["with"] and experts.guesses["without"]:
        times = (f"{experts.guesses[side] * 1e3:.1f} ms {side}" for side in ("with", "without"))
        acted = "acted on" if experts.guesses["on"] else "not acted on"
        console.print(f"a decoding step takes {', '.join(times)} predictions; they are {acted} now")


def print_shares(shares: Sequence[ShareReport], console: Console) -> None:
    """Print what this rank computes of each block, how even that is, and what it sent."""
    table = Table("experts shared, of", "calls", box=None, pad_edge=False)
    for name in ("here", "copies", "busiest", "tokens", "MB sent", "MB headers"):
        table.add_column(name, justify="right")
    for one in shares:
        calls = ", ".join(f"{count} {name}" for name, count in one.calls.items())
        sizes = (f"{size / 1e6:.2f}" for size in (one.sent_bytes, one.header_bytes))
        counts = (len(one.held), one.copies, f"{one.imbalance:.2f}x", one.tokens, *sizes)
        table.add_row(one.path, calls, *map(str, counts))
    console.print(table)
    console.print(f"shared {shares[0].across}; busiest is the fullest rank's load over the mean")


def print_speculation(speculation: dict[str, Any], console: Console) -> None:
    """Print what drafts of one source gave, and what each depth would give."""
    drafted, source = speculation["drafted"], speculation["source"]
    share = f", {speculation['accepted'] / drafted:.0%} of them right" if drafted else ""
    copied = speculation["copied_bytes"]
    console.print(
        f"drafts by {source}: {speculation['tokens']} tokens in {speculation['cycles']} passes, "
        f"{drafted} drafted{share}" + (f"; copies of {copied / 1e6:,.1f} MB" if copied else "")
    )
    rent = speculation["copies"]
    if rent is not None and rent["plain"] is not None:
        console.print(
            f"  copies are {'there' if rent['held'] else 'not there'}, made {rent['made']} times, "
            f"{rent['price']:.1f} s each; without, a token takes {rent['plain'] * 1e3:.1f} ms",
            highlight=False,
        )
    drafts = rent is None or rent["held"]
    for one in speculation["depths"]:
        chosen = " <- now" if drafts and one["k"] == speculation["k"] else ""
        console.print(
            f"  k={one['k']}: {one['tokens']:.2f} tokens / {one['seconds'] * 1e3:.1f} ms, of which "
            f"{one['draft'] * 1e3:.1f} drafting and {one['verify'] * 1e3:.1f} verifying{chosen}",
            highlight=False,
        )
    if speculation["calls_without_copy"]:
        calls = speculation["calls_without_copy"]
        console.print(f"  {calls} calls drafted with a block's own weights: it has no copy")


def print_graph(graph: GraphReport, console: Console) -> None:
    """Print one graph: what each pass did, the blocks, what was left alone."""
    console.print(_passes(graph.passes))
    _print_found((graph,), console)


def print_times(graph: GraphReport, console: Console) -> None:
    """Print where the time to compile a graph went, and the memory."""
    made = graph.compilation
    table = Table("compiling", box=None, pad_edge=False)
    table.add_column("seconds", justify="right")
    if made["tracing"] is not None:
        table.add_row("Dynamo, to the graph", f"{made['tracing']:.2f}")
    for step in graph.passes:
        table.add_row(f"pass {step['name']}", f"{step['milliseconds'] / 1e3:.2f}")
    calls = {one["name"]: f", called {len(one['paths'])} times" for one in graph.callees}
    for piece in made["pieces"]:
        by = made["inner"] if piece["eager"] is None else "eager"
        about = f"{by}, {piece['name']}: {piece['nodes']} nodes"
        table.add_row(about + calls.get(piece["name"], ""), f"{piece['seconds']:.2f}")
    console.print(table)
    console.print(f"memory: {made['resident']:.2f} GB before, {made['peak']:.2f} GB at its peak")


def _print_found(graphs: Sequence[GraphReport], console: Console) -> None:
    """Print the blocks, kernels and misses of some graphs, each once."""
    blocks = {block["path"]: block for graph in graphs for block in graph.blocks}
    if blocks:
        console.print(_blocks(tuple(blocks.values())))
        _print_described("routers", _routers(blocks.values()), console)
        _print_described("shared experts", _shared(blocks.values()), console)
        console.print("kernels")
        keys = [block[key] for key in ("kernel", "router_kernel") for block in blocks.values()]
        _print_list(dict.fromkeys(filter(None, keys)), console)
    for title, name in (("attention", "attentions"), ("linear layers", "linears")):
        found = {one["path"]: one["kernel"] for graph in graphs for one in getattr(graph, name)}
        if found:
            console.print(title)
            counts = Counter(found.values())
            _print_list((f"{kernel}: {count} layers" for kernel, count in counts.items()), console)
    callees = dict.fromkeys(_callee_text(one) for graph in graphs for one in graph.callees)
    if callees:
        console.print("layers compiled once")
        _print_list(callees, console)
    left = dict.fromkeys(text for graph in graphs if (text := _eager_text(graph)))
    if left:
        console.print("not compiled, as little of a call (inner='auto')")
        _print_list(left, console)
    misses = [f"{miss['where']}: {miss['why']}" for graph in graphs for miss in graph.misses]
    if misses:
        console.print("left alone")
        _print_list(dict.fromkeys(misses), console)


def _graphs(graphs: Sequence[GraphReport]) -> Table:
    table = Table("graph", box=None, pad_edge=False)
    for name in ("calls", "MoE blocks", "rewrites", "nodes", "ms in passes", "s inner", "peak GB"):
        table.add_column(name, justify="right")
    for number, graph in enumerate(graphs):
        made = graph.compilation
        inner = sum(piece["seconds"] for piece in made["pieces"])
        first, last = graph.passes[0], graph.passes[-1]
        rewrites = sum(step["rewrites"] for step in graph.passes)
        millis = sum(step["milliseconds"] for step in graph.passes)
        nodes = f"{first['nodes_before']} → {last['nodes_after']}"
        cells = (number, graph.calls, len(graph.blocks), rewrites, nodes, f"{millis:.1f}")
        cells = (*cells, f"{inner:.1f}", f"{made['peak']:.1f}")
        table.add_row(*map(str, cells))
    return table


def _passes(passes: Sequence[dict[str, Any]]) -> Table:
    table = Table("", "pass", box=None, pad_edge=False)
    for name in ("rewrites", "nodes", "ms"):
        table.add_column(name, justify="right")
    table.add_column("")
    for number, step in enumerate(passes, 1):
        before, after = step["nodes_before"], step["nodes_after"]
        nodes = str(after) if before == after else f"{before} → {after}"
        rewrites = str(step["rewrites"] or "–")
        cells = [str(number), step["name"], rewrites, nodes, f"{step['milliseconds']:.1f}"]
        table.add_row(*cells, step["note"])
    return table


def _callee_text(callee: dict[str, Any]) -> str:
    paths = callee["paths"]
    cuts = f", not fused across: {', '.join(callee['severed'])}" if callee["severed"] else ""
    return f"{paths[0]} to {paths[-1]}: {len(paths)} times {callee['nodes']} nodes{cuts}"


def _eager_text(graph: GraphReport) -> str:
    """Name what `inner="auto"` left as it is in a graph, if there is something."""
    pieces = [piece for piece in graph.compilation["pieces"] if piece["eager"] is not None]
    return ", ".join(f"{one['name']} {one['eager']:.1%}" for one in pieces)


def _blocks(blocks: Sequence[dict[str, Any]]) -> Table:
    table = Table("block", "style", "source", box=None, pad_edge=False)
    for name in ("E", "K", "H", "I"):
        table.add_column(name, justify="right")
    table.add_column("dtype")
    for block in blocks:
        sizes = [str(block[name]) for name in ("experts", "active", "hidden_size", "intermediate")]
        table.add_row(block["path"], block["style"], block["source"], *sizes, block["dtype"])
    return table


def _routers(blocks: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Give each block's router, its matrix and the block's path."""
    for block in blocks:
        if router := block["router"]:
            matrix = f"matrix {router['matrix']}{' + bias' * router['matrix_bias']}"
            about = (matrix if router["matrix"] else "", router["dtype"])
            yield router["text"], ", ".join(filter(None, about)), block["path"]


def _shared(blocks: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    for block in blocks:
        if shared := block["shared"]:
            yield shared["text"], "", block["path"]


def _print_described(
    title: str, described: Iterable[tuple[str, str, str]], console: Console
) -> None:
    """Print each description once, with the blocks that it holds for."""
    paths: dict[tuple[str, str], list[str]] = {}
    for text, about, path in described:
        paths.setdefault((text, about), []).append(path)
    if paths:
        console.print(title)
    for (text, about), holders in paths.items():
        more = f" and {len(holders) - 1} more" if len(holders) > 1 else ""
        console.print(f"  - {text}", markup=False, soft_wrap=True)
        about = f"{about}: " if about else ""
        where = f"    {about}{holders[0]}{more}"
        console.print(where, markup=False, soft_wrap=True, style="dim")


def _print_list(lines: Iterable[str], console: Console) -> None:
    for line in lines:
        console.print(f"  - {line}", markup=False)

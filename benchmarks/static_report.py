"""Write what `benchmarks.static_gpu` found as a page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.static_peers import PEERS
from benchmarks.static_traffic import DECOMPOSITIONS, DEEPSEEK_V3, flops, launches
from moecc.codegen.gpus import GPUS

Record = Mapping[str, Any]


def page(record: Record) -> str:
    """Write the page, in Markdown."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Record) -> Iterator[str]:
    shape = record["shape"]
    targets = list(dict.fromkeys(row["target"] for row in record["rows"]))
    yield "# What the Triton kernels compile to"
    yield ""
    yield "Written by `python -m benchmarks.static_gpu --markdown docs/static_gpu.md`; do not edit."
    yield ""
    yield (
        f"Triton {record['triton']}; H={shape['hidden']}, I={shape['intermediate']}, "
        f"E={shape['experts']}, K={shape['active']} (Qwen3-30B-A3B), bfloat16. Compiled for GPUs "
        "that were not there: these are counts of the machine code, not times. `python -m "
        "benchmarks.gpu` takes the times where there is a GPU."
    )
    yield ""
    yield "## The layer"
    yield ""
    yield from _layer(record)
    yield ""
    yield "## Beside other kernels"
    yield ""
    yield from _peers(record)
    for target in targets:
        yield ""
        yield f"## {target}, as on {GPUS[target].board}"
        yield ""
        yield from _target([row for row in record["rows"] if row["target"] == target])


def _layer(record: Record) -> Iterator[str]:
    yield (
        "Launches and bytes from the router's logits to the layer's output, with uniform routing, "
        "each place read once a launch (`benchmarks/static_traffic.py`). In brackets the bytes "
        "that are not the minimum's: what passes from launch to launch."
    )
    yield ""
    yield from _traffic(record["shape"], record["tokens"])
    yield ""
    sizes = "H={hidden}, I={intermediate}, E={experts}, K={active}".format(**DEEPSEEK_V3)
    yield f"With a shared expert's output to add (DeepSeek-V3: {sizes}):"
    yield ""
    yield from _traffic(DEEPSEEK_V3, record["tokens"])
    yield ""
    yield (
        "More than 2048 assignments are sorted by three launches instead of one, and vLLM's "
        "alignment takes two. The decode kernels read an expert's weights again for each further "
        "token that chose it, from L2 at best, and are not chosen where that costs more. Bytes of "
        "weights fall with their bits in every row."
    )


def _traffic(shape: Mapping[str, int], counts: Sequence[int]) -> Iterator[str]:
    columns = [f"T={tokens}" for tokens in counts]
    yield f"| | launches | {' | '.join(columns)} |"
    yield "|---|---:|" + "---:|" * len(columns)
    for name in DECOMPOSITIONS:
        steps = launches(name, shape, 1)
        cells: list[str] = []
        for tokens in counts:
            least, took = (
                sum(step.bytes for step in launches(one, shape, tokens))
                for one in ("minimum", name)
            )
            more = f" (+{(took - least) / 1e6:.2f})" if name != "minimum" else ""
            cells.append(f"{took / 1e6:.1f} MB{more}")
        count = "" if name == "minimum" else len(steps)
        yield f"| {name} | {count} | {' | '.join(cells)} |"
    products = [f"{flops(shape, tokens) / 1e9:.2f} GFLOP" for tokens in counts]
    yield f"| *products* | | {' | '.join(products)} |"


def _peers(record: Record) -> Iterator[str]:
    yield (
        "The same compiler, target and number of columns. *Loop*: instructions of the loop that "
        "runs most, for as many products. Sources of the peers' figures: "
        "`benchmarks/static_peers.py`. Where ours has more: registers of int4, as a step of ours "
        "holds four times the weights, and 8 bytes of shared memory, a barrier."
    )
    yield ""
    yield "| | weights | target | registers | shared | products | loop |"
    yield "|---|---|---|---:|---:|---|---:|"
    rows = {(row["weights"], row["kernel"], row["target"]): row for row in record["rows"]}
    for peer in PEERS:
        row = rows.get((peer.weights, peer.ours, peer.target))
        if row is None:
            continue
        cells = (peer.name, peer.weights, peer.target, peer.registers, peer.shared or "")
        yield f"| {' | '.join(map(str, (*cells, peer.products, peer.loop or '')))} |"
        products = f"{row['product_count']} {row['products']}"
        cells = (f"moecc {peer.ours}", peer.weights, peer.target, row["registers"], row["shared"])
        yield f"| {' | '.join(map(str, (*cells, products, row['loop'])))} |"


def _target(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| weights | kernel | registers | spilled | shared | warps × stages | blocks | occupancy "
        "| products | async | loop | all |"
    )
    yield "|---|---|---:|---:|---:|---|---:|---:|---|---:|---:|---:|"
    for row in rows:
        products = f"{row['product_count']} {row['products']}" if row["products"] else ""
        by_descriptor = row["descriptor_copies"]
        cells = (
            row["weights"],
            row["kernel"],
            row["registers"],
            row["spilled"],
            row["shared"],
            f"{row['warps']} × {row['stages']}",
            row["blocks"],
            f"{row['occupancy']:.0%}",
            products,
            f"{row['async_copies']}{f' ({by_descriptor} TMA)' if by_descriptor else ''}",
            row["loop"] or "",
            row["instructions"],
        )
        yield f"| {' | '.join(map(str, cells))} |"

"""Draw measured kernels under the two roofs of a machine: reading memory, and float32 products.

    python -m benchmarks.roofline RESULTS.json FILE.svg

RESULTS.json is what `benchmarks.kernels --json` wrote. To the right: more products for each byte of
weights, and so more tokens. Integer products may pass the flat roof, which counts float32 ones.
"""

import json
import sys
from pathlib import Path
from typing import Any

from moecc.runtime.errors import MissingExtra

COLOURS = {
    "fp32": "#4c4c4c",
    "bf16": "#0072b2",
    "fp16": "#56b4e9",
    "int8": "#d55e00",
    "int4": "#009e73",
    "mxfp4": "#cc79a7",
}
MARKS = {"moecc": "o", "ggml": "x", "eager": "v", "grouped_mm": "s", "batched_mm": "^"}


def require() -> None:
    """Raise `MissingExtra` unless there is something to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtra("plots need matplotlib: pip install moecc[plot]") from error


def draw(record: dict[str, Any], file: Path) -> None:
    """Draw all results of a record; the suffix of the file says in which format."""
    require()
    from matplotlib.figure import Figure

    results = record["results"]
    bandwidth, rate = record["bandwidth"] / 1e9, record["product_rate"] / 1e9
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    along = [row["gigaflops"] / row["gigabytes"] for row in results]
    ends = [min(along) / 1.5, rate / bandwidth, max(max(along), rate / bandwidth) * 1.5]
    roof = [min(rate, bandwidth * x) for x in ends]
    axes.plot(ends, roof, color="black", linewidth=1, label="reads, float32 products")
    for kind, contender in dict.fromkeys((row["kind"], row["contender"]) for row in results):
        rows = [row for row in results if (row["kind"], row["contender"]) == (kind, contender)]
        name = contender.split()[0]
        if name in ("eager", "grouped_mm", "batched_mm") and not contender.endswith(kind):
            continue  # the same contender stands under its own dtype
        axes.plot(
            [row["gigaflops"] / row["gigabytes"] for row in rows],
            [row["gigaflops"] / row["milliseconds"] * 1e3 for row in rows],
            color=COLOURS.get(kind),
            marker=MARKS[name],
            linestyle="-" if name == "moecc" else ":",
            linewidth=1,
            markersize=5,
            label=f"{contender} {kind}" if name == "moecc" else contender,
        )
    axes.set(xscale="log", yscale="log", title=f"{record['shape']}\n{record['machine']}")
    axes.set(xlabel="FLOPs for each byte of weights", ylabel="GFLOP/s")
    axes.grid(which="both", linewidth=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

"""Write what `benchmarks.kernels` measured as Markdown.

    python -m benchmarks.kernel_table RESULTS.json

A cell has moecc's time, the floor over it, llama.cpp's time over it, and that of the quickest of
transformers over it; a dash where that was not timed.
"""

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(record: dict[str, Any]) -> str:
    """Give the table of a record: a line for each number of bits, a column for each T."""
    rows: list[Row] = record["results"]
    kinds, tokens = ([*dict.fromkeys(row[name] for row in rows)] for name in ("kind", "tokens"))
    bandwidth, rate = record["bandwidth"] / 1e9, record["product_rate"] / 1e9
    lines = [
        f"{record['machine']}; reads {bandwidth:.1f} GB/s, float32 products {rate:.0f} GFLOP/s "
        "(medians over the cells).",
        "",
        "| | " + " | ".join(f"T={count}" for count in tokens) + " |",
        "|---|" + "---:|" * len(tokens),
    ]
    for kind in kinds:
        cells = [cell(rows, kind, count) for count in tokens]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(rows: list[Row], kind: str, tokens: int) -> str:
    """Compare the contenders of one cell; a dash if there is none."""
    timed = {
        row["contender"]: row for row in rows if (row["kind"], row["tokens"]) == (kind, tokens)
    }
    if "moecc" not in timed:
        return "–"
    ours = timed.pop("moecc")
    took = ours["milliseconds"]
    llama = [row["milliseconds"] for name, row in timed.items() if name.startswith("ggml")]
    others = [row["milliseconds"] for name, row in timed.items() if not name.startswith("ggml")]
    ratios = (f"{min(each) / took:.2f}x" if each else "–" for each in (llama, others))
    return ", ".join([f"{took:.1f} ms", f"{ours['floor_milliseconds'] / took:.0%}", *ratios])


if __name__ == "__main__":
    print(write(json.loads(Path(sys.argv[1]).read_text())))

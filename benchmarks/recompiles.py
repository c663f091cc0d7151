"""Count the graphs that token counts and batches cost: a compiler's silent price.

    python -m benchmarks.recompiles --family qwen3_moe,mixtral --json FILE

A tiny model is called with prompts of many lengths, in two batches, then with single tokens. Graphs
are those that Dynamo hands to a backend. moecc must not be handed more than any other backend, with
transformers' grouped_mm, which leaves a graph whole: exit status is 1 if it is.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import reset
from torch._dynamo.utils import counters

from benchmarks.timing import stamp, table
from moecc.tiny import tiny_model

SHAPES = [(1, 7), (1, 16), (1, 33), (1, 100), (3, 5), (3, 40), (1, 1), (3, 1)]
"""Sequences and tokens, in the order of the calls."""


def main() -> int:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", default="qwen3_moe,mixtral,gpt_oss,deepseek_v3")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first of them")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch._dynamo")
    rows: list[dict[str, Any]] = []
    for family in arguments.family.split(","):
        plain, ours = (graphs(family, one, arguments.shapes) for one in ("eager", "moecc"))
        wrong = f"{ours} graphs where Dynamo alone makes {plain}" if ours > plain else ""
        rows.append({"contender": "dynamo", "family": family, "graphs": plain})
        rows.append({"contender": "moecc", "family": family, "graphs": ours, "wrong": wrong})
    lines = [["graphs", "Dynamo alone", "moecc"]]
    for plain, ours in zip(rows[::2], rows[1::2], strict=True):
        lines.append([plain["family"], str(plain["graphs"]), str(ours["graphs"])])
    print(table(lines))
    if arguments.json:
        record = {**stamp(), "results": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row.get("wrong") for row in rows))


def graphs(family: str, backend: str, shapes: int) -> int:
    """Call a tiny model with so many shapes, and count the graphs that were compiled."""
    reset()
    counters.clear()
    model: Any = tiny_model(family, use_cache=False)
    model.config._experts_implementation = "grouped_mm"
    options: Any = {"inner": "eager"} if backend == "moecc" else None
    call = torch.compile(model, backend=backend, options=options)
    with torch.no_grad():
        for shape in SHAPES[:shapes]:
            call(torch.randint(3, 60, shape))
    return counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    sys.exit(main())

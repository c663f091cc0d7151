"""Compile a MODEL just far enough to show what each pass did: `moecc passes`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moecc import __version__
from moecc import dump as dumping
from moecc.models import load_model
from moecc.passes.pipeline import PIPELINE
from moecc.passes.text import graph_diff
from moecc.records import Record, all_records
from moecc.render import print_graph
from moecc.reporting import graph_report
from moecc.runtime.errors import ModelError, OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The graphs that one call of a model compiled to."""

    name: str
    records: tuple[Record, ...]


def inspect(name: str, kernels: str = "auto", dtype: str = "auto") -> Inspection:
    """Load a model and call it once under the backend; graphs keep their text.

    The inner backend is `eager`: only moecc's own passes are of interest here.
    """
    loaded = load_model(name, dtype)
    before = len(all_records())
    options: dict[str, Any] = {"inner": "eager", "kernels": kernels}
    compiled = torch.compile(loaded.model, backend="moecc", options=options)
    with dumping.keeping_text(), torch.no_grad():
        compiled(*loaded.inputs)
    records = all_records()[before:]
    if not records:
        raise ModelError(
            f"{name!r} gave Dynamo no graph at all: nothing in its forward is a tensor"
        )
    return Inspection(name=name, records=records)


def has_problem(seen: Inspection) -> bool:
    """Tell whether no block was found, or something fell back."""
    blocks = any(record.blocks for record in seen.records)
    return not blocks or any(miss.fallback for record in seen.records for miss in record.misses)


def to_dict(seen: Inspection) -> dict[str, Any]:
    """Give everything but the texts as plain values."""
    from dataclasses import asdict

    return {
        "model": seen.name,
        "version": __version__,
        "torch": torch.__version__,
        "graphs": [asdict(graph_report(record)) for record in seen.records],
    }


def print_inspection(seen: Inspection, console: Console) -> None:
    """Print each graph's passes, blocks, kernels and misses."""
    console.print(f"moecc {__version__} · torch {torch.__version__} · {seen.name}", highlight=False)
    if not any(record.blocks for record in seen.records):
        console.print("note: no MoE block found")
    for number, record in enumerate(seen.records):
        console.print(f"\ngraph {number} of {len(seen.records)}", highlight=False)
        print_graph(graph_report(record), console)


def diff_text(seen: Inspection, name: str) -> str:
    """Show what one pass changed in every graph.

    Raises `OptionError` if there is no such pass.
    """
    names = [one.__name__ for one in PIPELINE]
    if name not in names:
        raise OptionError(f"--diff {name!r} is not a pass; there are {names}")
    steps = [step for record in seen.records for step in record.steps if step.name == name]
    diffs = [graph_diff(step.before, step.after, name) for step in steps]
    return "\n".join(diffs).strip() or f"{name} changed nothing"


def dump(seen: Inspection, folder: Path) -> tuple[Path, ...]:
    """Write every graph before and after each pass, and the kernels; return the files."""
    return tuple(
        file
        for number, record in enumerate(seen.records)
        for file in dumping.write_to(folder / f"graph{number}", record.steps, record.lowerings)
    )

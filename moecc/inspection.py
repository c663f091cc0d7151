"""Compile a MODEL just far enough to show what each pass did: `moecc passes`."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from moecc import __version__
from moecc import dump as dumping
from moecc.checkpoint.folders import near
from moecc.fold_layers import Folded
from moecc.models import sketch_model
from moecc.passes.pipeline import PIPELINE
from moecc.passes.text import graph_diff
from moecc.records import Record, all_records
from moecc.render import print_graph, print_times
from moecc.reporting import GraphReport, graph_report
from moecc.runtime.errors import ModelError, MoeccError, OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The graphs that one call of a model compiled to."""

    name: str
    records: tuple[Record, ...]
    folded: tuple[Folded, ...] = ()
    """Stacks of layers of which some were left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """What each pass did to each graph."""

    model: str
    version: str
    """Of moecc."""
    torch: str
    notes: tuple[str, ...]
    """What the graphs do not show."""
    graphs: tuple[GraphReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """What one pass changed."""

    name: str
    diff: str
    """Unified, of every graph; empty where nothing changed."""


def inspect(
    name: str,
    kernels: str = "auto",
    dtype: str = "auto",
    full: bool = False,
    all_layers: bool = False,
    weights: bool = False,
    inner: str = "eager",
) -> Inspection:
    """Make a model, as `sketch_model` does, and call it under the backend; graphs keep their text.

    The inner backend is `eager` where only moecc's own passes are of interest. Raises `OptionError`
    for another one on a model without weights, which what it compiles would read.
    """
    loaded = sketch_model(name, dtype, full, all_layers, weights)
    if inner != "eager" and not isinstance(loaded.context, nullcontext):
        raise OptionError(f"--time runs what {inner} compiles, so {name!r} needs --weights")
    before = len(all_records())
    options: dict[str, Any] = {"inner": inner, "kernels": kernels}
    compiled = torch.compile(loaded.model, backend="moecc", options=options)
    with loaded.context, dumping.keeping_text(), torch.no_grad():
        _call(name, compiled, loaded.inputs)
    records = all_records()[before:]
    if not records:
        raise ModelError(
            f"{name!r} gave Dynamo no graph at all: nothing in its forward is a tensor"
        )
    return Inspection(name=name, records=records, folded=loaded.folded)


def _call(name: str, compiled: Any, inputs: Sequence[Any]) -> None:
    try:
        compiled(*inputs)
    except MoeccError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"the code of {name!r} decides by values ({error.func}), and it has no weights to have "
            "any; load them with --weights, or look at its model type, a tiny random instance"
        ) from error
    except Exception as error:  # whatever the model's own code, or Dynamo on it, raises
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"calling {name!r} failed: {type(error).__name__}: {reason}") from error


def has_problem(seen: Inspection) -> bool:
    """Tell whether no block was found, or something fell back."""
    blocks = any(record.blocks for record in seen.records)
    return not blocks or any(miss.fallback for record in seen.records for miss in record.misses)


def told(seen: Inspection) -> Inspected:
    """Give everything but the texts."""
    return Inspected(
        model=seen.name,
        version=__version__,
        torch=torch.__version__,
        notes=tuple(map(str, seen.folded)),
        graphs=tuple(map(graph_report, seen.records)),
    )


def print_inspection(seen: Inspected, console: Console, timed: bool = False) -> None:
    """Print each graph's passes, blocks, kernels and misses, `timed` what compiling it took."""
    about = f"moecc {seen.version} · torch {seen.torch} · {seen.model}"
    console.print(about, markup=False, highlight=False)
    for note in seen.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if not any(graph.blocks for graph in seen.graphs):
        console.print("note: no MoE block found")
    for number, graph in enumerate(seen.graphs):
        console.print(f"\ngraph {number} of {len(seen.graphs)}", highlight=False)
        print_graph(graph, console)
        if timed:
            print_times(graph, console)


def check_pass(name: str) -> None:
    """Raise `OptionError` if there is no such pass."""
    names = [one.__name__ for one in PIPELINE]
    if name not in names:
        raise OptionError(f"--diff {name!r} is not a pass{near(name, names)}; there are {names}")


def diff_of(seen: Inspection, name: str) -> Diff:
    """Show what one pass changed in every graph.

    Raises `OptionError` if there is no such pass.
    """
    check_pass(name)
    steps = [step for record in seen.records for step in record.steps if step.name == name]
    diffs = [graph_diff(step.before, step.after, name) for step in steps]
    return Diff(name=name, diff="\n".join(diffs).strip())


def print_diff(seen: Diff, console: Console) -> None:
    """Print a diff, what was taken in red and what came in green."""
    for line in seen.diff.splitlines() or [f"{seen.name} changed nothing"]:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def dump(seen: Inspection, folder: Path) -> tuple[Path, ...]:
    """Write every graph before and after each pass, and the kernels; return the files."""
    return tuple(
        file
        for number, record in enumerate(seen.records)
        for file in dumping.write_to(folder / f"graph{number}", record.steps, record.lowerings)
    )

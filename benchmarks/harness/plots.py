"""Draw records: a picture for each measured field of a suite, a bar for each contender and cell."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.harness.record import Record
from moecc.runtime.errors import MissingExtra


def require() -> Any:
    """Give matplotlib's pyplot; raises `MissingExtra` if it is not there."""
    try:
        import_module("matplotlib").use("Agg")  # draws to files, where there is no screen, too
        return import_module("matplotlib.pyplot")
    except ImportError as error:
        raise MissingExtra("plots need matplotlib: pip install moecc[plot]") from error


def plot(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write SUITE-FIELD.svg files and name them; raises `MissingExtra` without matplotlib."""
    pyplot = require()
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    measured = dict.fromkeys((one.suite, name) for one in records for name in one.values)
    for suite, name in measured:
        mine = [one for one in records if one.suite == suite and name in one.values]
        figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.25 * len(mine)))
        medians = [one.values[name].median for one in mine]
        spreads = [one.values[name].spread or (m, m) for one, m in zip(mine, medians, strict=True)]
        errors = [
            [max(0.0, m - low) for m, (low, _) in zip(medians, spreads, strict=True)],
            [max(0.0, high - m) for m, (_, high) in zip(medians, spreads, strict=True)],
        ]
        colours = ["C0" if one.contender.startswith("moecc") else "C7" for one in mine]
        axes.barh(range(len(mine)), medians, xerr=errors, color=colours)
        axes.set_yticks(range(len(mine)), [_label(one) for one in mine], fontsize="x-small")
        axes.invert_yaxis()
        axes.set_xlabel(name.replace("_", " "))
        axes.set_title(suite, loc="left")
        files.append(folder / f"{suite}-{name}.svg")
        figure.savefig(files[-1], bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
    return files


def _label(one: Record) -> str:
    cell = ", ".join(str(value) for value in one.cell.values())
    return ", ".join(filter(None, (one.scenario, cell, one.contender)))

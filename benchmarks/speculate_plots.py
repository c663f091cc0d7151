"""Draw what `benchmarks.speculate` measured: tokens a second over depth, a panel for each cell."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.plots import require

_CELL = ("text", "memory", "link", "corrupt")


def plot(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write speculate.svg; raises `MissingExtra` without matplotlib."""
    pyplot = require()
    cells = list(dict.fromkeys(tuple(row[name] for name in _CELL) for row in results))
    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 2.8 * rows), squeeze=False, layout="constrained"
    )
    for panel in axes.flat[len(cells) :]:
        panel.set_visible(False)
    for panel, cell in zip(axes.flat, cells, strict=False):
        rates = {
            row["contender"]: row["tokens_per_second"]
            for row in results
            if tuple(row[name] for name in _CELL) == cell
        }
        depths = [name for name in rates if name.startswith("k=")]
        panel.plot([int(name[2:]) for name in depths], [rates[name] for name in depths], "o-")
        for name, style in (("lru", ":"), ("lfu + prefetch", "--"), ("auto", "-")):
            panel.axhline(rates[name], linestyle=style, color="black", linewidth=1, label=name)
        text, memory, link, corrupt = cell
        wrong = f", {corrupt:.0f} % corrupted" if corrupt else ""
        panel.set_title(f"{text}, {memory}, {link:.0f} MB/s{wrong}", fontsize=9)
        panel.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("tokens drafted")
    figure.supylabel("tokens a second")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "speculate.svg")

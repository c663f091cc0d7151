"""Draw what `benchmarks.offload` found: tokens/s and hit rates against how much is in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.plots import require


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write speed.svg and hits.svg from rows as in the JSON.

    Raises `MissingExtra` without matplotlib.
    """
    pyplot = require()
    folder.mkdir(parents=True, exist_ok=True)
    for name, key, label, scale in (
        ("speed", "tokens_per_second", "tokens a second", 1),
        ("hits", "hit_rate", "hits, per cent", 100),
    ):
        figure, axes = pyplot.subplots(figsize=(6.4, 4))
        for contender in dict.fromkeys(row["contender"] for row in rows):
            points = [
                (float(row["memory"].rstrip("%")), row[key] * scale)
                for row in rows
                if row["contender"] == contender and row[key] is not None
            ]
            if points:
                style = "--" if contender in ("foreseen", "oracle", "bound") else "o-"
                axes.plot(*zip(*sorted(points), strict=True), style, label=contender)
        axes.set_xlabel("experts in memory, per cent")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize="small")
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)

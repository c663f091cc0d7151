"""Write the results of `benchmarks.quality` as the table of docs/benchmarks.md.

python -m benchmarks.quality_table benchmarks/results/quality.json
"""

import json
import sys
from pathlib import Path
from typing import Any


def write(record: dict[str, Any]) -> str:
    """Give a row for each contender, models beside each other, by bits and KL on the first."""
    rows: list[dict[str, Any]] = record["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["family"], row["name"], row["model"]): row for row in rows}
    first = [row for row in rows if row["model"] == models[0]]
    heads = " | ".join(f"{model}: bits | KL | perplexity | same token" for model in models)
    lines = [f"| | {heads} |", "|---|" + "---:|" * 4 * len(models)]
    for row in sorted(first, key=lambda one: (one["bits"], one["kl"])):
        family, name = row["family"], row["name"]
        label = f"**{name}**" if family == "moecc" else f"{family}: {name}"
        cells = [_cells(found[family, name, model]) for model in models]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    """Give bits, KL and change of perplexity with their standard errors, and agreement."""
    kl = f"{row['kl']:.5f} ±{row['kl_error']:.5f}"
    change = f"{row['change']:+.2%} ±{row['change_error'] * 100:.2f}"
    return f"{row['bits']:.3f} | {kl} | {change} | {row['agreement']:.1%}"


if __name__ == "__main__":
    print(write(json.loads(Path(sys.argv[1]).read_text())))

"""Time what importing moecc, and finding its backend, takes beyond importing torch.

    python -m benchmarks.import_time --rounds 9 --json FILE

A fresh interpreter for each round, taking turns; each prints the seconds that its imports took. The
goal is 0.3 s beyond torch (`docs/decisions/0027` is about the rest of a cold start).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.timing import machine, stamp, table

LINES = {
    "torch": "import torch",
    "moecc": "import torch, moecc",
    "moecc backend": "import torch; torch._dynamo.lookup_backend('moecc')",
    "inductor backend": "import torch; torch._dynamo.lookup_backend('inductor')",
}
PROGRAM = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print(machine())
    taken: dict[str, list[float]] = {name: [] for name in LINES}
    for number in range(arguments.rounds + 1):
        for name, line in LINES.items():
            seconds = import_seconds(line)
            if number:  # the first writes byte code and fills the page cache
                taken[name].append(seconds)
    base = statistics.median(taken["torch"])
    rows = [
        {
            "contender": name,
            "seconds": statistics.median(times),
            "beyond_torch": statistics.median(times) - base,
            "spread": (min(times), max(times)),
        }
        for name, times in taken.items()
    ]
    lines = [["", "seconds", "beyond torch"]]
    lines += [
        [str(r["contender"]), f"{r['seconds']:.3f}", f"{r['beyond_torch']:.3f}"] for r in rows
    ]
    print(table(lines))
    if arguments.json:
        record = {**stamp(), "results": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def import_seconds(line: str) -> float:
    """Run a line in a fresh interpreter, and give the seconds that it took."""
    command = [sys.executable, "-c", PROGRAM.format(line)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    main()

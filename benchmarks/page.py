"""Write docs/benchmarks.md: the prose of a template, the figures of committed records.

    python -m benchmarks.page            # after a new record in benchmarks/results
    python -m benchmarks.page --check    # exit status 1 if the page is not what they say

In `benchmarks/page.md`, a line `<!-- table KIND FILE.json -->` stands for the table of a program's
record (of several, joined), and `<!-- suite NAME -->` for those of `results/NAME.jsonl`, which
`moecc bench NAME --json` writes. Each has the date, commit and machine that its record names.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import markdown, record, scenario
from benchmarks.tables import TABLES

FOLDER = Path(__file__).parent
TEMPLATE, RESULTS = FOLDER / "page.md", FOLDER / "results"
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
_LINE = re.compile(r"^<!-- (table|suite) (.+) -->$", re.MULTILINE)
_NOTE = (
    "<!-- Written by `python -m benchmarks.page` from benchmarks/page.md and benchmarks/results; "
    "do not edit. -->\n"
)


def page() -> str:
    """Give the page; raises `ValueError` naming a line of the template that means nothing."""
    return _NOTE + _LINE.sub(lambda found: _filled(*found.groups()), TEMPLATE.read_text())


def _filled(what: str, arguments: str) -> str:
    return _suite(arguments) if what == "suite" else _table(*arguments.split())


def _table(kind: str, *files: str) -> str:
    if kind not in TABLES:
        raise ValueError(f"{TEMPLATE.name}: no kind of table {kind!r}; there are {sorted(TABLES)}")
    told: list[dict[str, Any]] = [json.loads((RESULTS / file).read_text()) for file in files]
    lines = [f"`{file}`: {_stamp(one)}" for file, one in zip(files, told, strict=True)]
    return "\n".join(["  \n".join(lines), "", TABLES[kind](told)])


def _stamp(told: dict[str, Any]) -> str:
    """Say when and on what a program's record was made, as far as it says."""
    machine = told["machine"]
    if "bandwidth" in told:
        machine += f"; reads {told['bandwidth'] / 1e9:.1f} GB/s"
    if "product_rate" in told:
        machine += f", float32 products {told['product_rate'] / 1e9:.0f} GFLOP/s"
    return markdown.stamp(told.get("date"), told.get("commit"), machine)


def _suite(name: str) -> str:
    about, file = scenario.read(name).about, RESULTS / f"{name}.jsonl"
    command = f"`moecc bench {name} --json benchmarks/results/{file.name}`"
    if not file.exists():
        return f"{command}: {about} No run of the whole suite is recorded."
    return f"{command}: {about}\n\n{markdown.page(record.read(file))}"


def main() -> int:
    """Write the page, or check it."""
    if "--check" in sys.argv:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Keep what was measured: one JSON line for each contender in each cell."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import Machine

Cell = dict[str, str | int | float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One measured quantity."""

    median: float
    spread: tuple[float, float] | None = None
    """The smallest and the largest of the rounds."""
    less: bool = True
    """Small ones are better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One contender in one cell of one scenario, and on what it was measured."""

    suite: str
    scenario: str
    contender: str
    cell: Cell
    values: dict[str, Value]
    """None of them where it was skipped or computed something else."""
    skipped: str = ""
    """Why it did not run."""
    wrong: str = ""
    """In what its results are not those of the others."""
    how: str
    """What runs the contender, with its settings."""
    command: str
    """What was typed to time it beside the others."""
    quick: bool
    """Too small to say anything about speed."""
    peak_memory: int | None = None
    """Bytes that the process of the scenario had resident at most."""
    date: str
    commit: str
    machine: Machine

    @property
    def key(self) -> tuple[object, ...]:
        """Tell it from the others of a run, and find it in another run."""
        return self.suite, self.scenario, self.contender, *self.cell.items()


def write(records: Iterable[Record], file: Path) -> None:
    """Write JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(asdict(one)) + "\n" for one in records))


def read(file: Path) -> list[Record]:
    """Read JSON lines; raises `ValueError` naming the line that is none of ours."""
    found: list[Record] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            found.append(_record(json.loads(line)))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file}, line {number} is not a record: {error}") from error
    return found


def _record(told: dict[str, Any]) -> Record:
    tables: dict[str, dict[str, Any]] = told["values"]
    values = {
        name: Value(
            median=one["median"],
            spread=one["spread"] and (one["spread"][0], one["spread"][1]),
            less=one["less"],
        )
        for name, one in tables.items()
    }
    whole: dict[str, Any] = {**told, "values": values, "machine": Machine(**told["machine"])}
    return Record(**whole)

"""Make records of the rows that a program wrote."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from benchmarks.harness import contenders
from benchmarks.harness.errors import ScenarioError
from benchmarks.harness.machine import Machine
from benchmarks.harness.record import Cell, Record, Value
from benchmarks.harness.scenario import Program, Scenario, Suite

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A program that ran: what all records of its rows share."""

    suite: Suite
    scenario: Scenario
    command: str
    date: str
    commit: str
    machine: Machine
    quick: bool
    peak_memory: int | None

    @property
    def program(self) -> Program:
        """Say how its rows are read."""
        return self.suite.programs[self.scenario.program]

    def record(self, contender: str, row: Row | None = None, skipped: str = "") -> Record:
        """Make the record of a row, or of a contender that has none; wrong results have no time."""
        row = row or {}
        wrong: str = row.get("wrong") or ""
        if self.program.right and row.get(self.program.right) is False:
            wrong = f"{self.program.right.replace('_', ' ')}: no"
        counts = row and not wrong and not skipped
        return Record(
            suite=self.suite.name,
            scenario=self.scenario.name,
            contender=contender,
            cell={name: row.get(name) for name in self.program.cell} if row else Cell(),
            values=values_of(row, self.program) if counts else {},
            skipped=skipped,
            wrong=wrong,
            how=contenders.find(contender).command,
            command=self.command,
            quick=self.quick,
            peak_memory=row.get("peak_memory") or (self.peak_memory if counts else None),
            date=self.date,
            commit=self.commit,
            machine=self.machine,
        )


def read_rows(file: Path, program: Program) -> list[Row]:
    """Read what a program wrote, and check that it has the fields that the suite names."""
    text = file.read_text()
    told = json.loads(text)[program.rows] if program.rows else map(json.loads, text.splitlines())
    rows: list[Row] = list(told)
    for row in rows:
        named = program.contender.startswith("=")
        row["contender"] = program.contender[1:] if named else row[program.contender]
        lacking = {*program.cell, *program.measured} - row.keys()
        if lacking and not (row.get("skipped") or row.get("wrong")):
            raise ScenarioError(f"benchmarks/{program.name}.py wrote no {lacking} in {row}")
    return rows


def seen_by(file: Path, program: Program, here: Machine) -> Machine:
    """Give the machine as the program saw it: held to an instruction set, with its own rates."""
    if not program.rows:
        return here
    told: dict[str, Any] = json.loads(file.read_text())
    return replace(
        here,
        cpu=told.get("machine", here.cpu),
        read_bandwidth=told.get("bandwidth", here.read_bandwidth),
        product_rate=told.get("product_rate", here.product_rate),
    )


def records(run: Run, rows: Sequence[Row]) -> list[Record]:
    """Make a record of each row, and of each contender of the suite that cannot run here."""
    found = [run.record(row["contender"], row, row.get("skipped") or "") for row in rows]
    took_part = {contenders.find(one.contender).name for one in found}
    for name in run.suite.contenders:
        reason = contenders.why_absent(contenders.find(name))
        if reason and name not in took_part:
            found.append(run.record(name, skipped=reason))
    return found


def values_of(row: Row, program: Program) -> dict[str, Value]:
    """Read what was measured; a spread is that of the first field, or by field."""
    given = row.get(program.spread)
    first = program.measured[0]
    spread = cast("Row", given if isinstance(given, dict) else {first: given} if given else {})
    return {
        name: Value(
            median=row[name],
            spread=(spread[name][0], spread[name][1]) if name in spread else None,
            less=name in program.less,
        )
        for name in program.measured
        if row.get(name) is not None
    }


def wrong_of_ours(found: Sequence[Record]) -> str:
    """Say which of moecc's results are wrong: what others compute is their matter."""
    ours = [one for one in found if one.wrong and contenders.find(one.contender).ours]
    return "; ".join(f"{one.contender}, {one.cell}: {one.wrong}" for one in ours)

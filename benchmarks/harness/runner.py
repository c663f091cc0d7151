"""Run the scenarios of a suite, each in a fresh process, and make records of what they write."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import contenders, machine
from benchmarks.harness.errors import ScenarioError
from benchmarks.harness.machine import ROOT, Machine
from benchmarks.harness.record import Cell, Record, Value
from benchmarks.harness.scenario import Program, Scenario, Suite

QUICK_SECONDS = 110
"""After which a scenario of a quick run has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One scenario: its records, and what went wrong."""

    suite: str
    scenario: str
    seconds: float
    records: tuple[Record, ...]
    failure: str = ""
    """Why there may be none, or which of our results are wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What all records of a scenario share."""

    command: str
    date: str
    commit: str
    machine: Machine
    quick: bool
    peak_memory: int | None = None


def run(suites: Sequence[Suite], quick: bool) -> Iterator[Ran]:
    """Run all scenarios, one after the other; quick ones side by side, as their times are not told.

    Rates of the machine are measured before each scenario of a full run.
    """
    scenarios = [
        (suite, one) for suite in suites for one in suite.scenarios if not quick or one.quick
    ]
    now = machine.measure_apart(rates=False) if quick else None
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1) if quick else 1) as pool:
        yield from pool.map(lambda one: run_scenario(*one, now), scenarios)


def run_scenario(suite: Suite, scenario: Scenario, quick_on: Machine | None) -> Ran:
    """Run a scenario: quickly on the machine given, or fully on this one, measured before."""
    quick = quick_on is not None
    options = scenario.quick if quick else scenario.options
    typed = ["-m", f"benchmarks.{scenario.program}", *shlex.split(options or "")]
    here = quick_on or machine.measure_apart(rates=True)
    start = time.perf_counter()
    stamp = partial(
        Stamp,
        command=f"python {shlex.join(typed)}",
        date=machine.now(),
        commit=machine.commit(),
        machine=here,
        quick=quick,
    )
    program = suite.programs[scenario.program]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        limit = QUICK_SECONDS if quick else scenario.minutes * 60
        failure, peak = _spawn([sys.executable, *typed, "--json", str(file)], limit, quiet=quick)
        try:
            rows = read_rows(file, program)
            found = records(suite, scenario, rows, stamp(peak_memory=peak))
        except (OSError, KeyError, ValueError) as error:
            failure, found = failure or f"{type(error).__name__}: {error}", []
    failure = failure or wrong_of_ours(found)
    seconds = time.perf_counter() - start
    return Ran(
        suite=suite.name,
        scenario=scenario.name,
        seconds=seconds,
        records=tuple(found),
        failure=failure,
    )


def read_rows(file: Path, program: Program) -> list[dict[str, Any]]:
    """Read what a program wrote, and check that it has the fields that the suite names."""
    text = file.read_text()
    if program.rows:
        rows = json.loads(text)[program.rows]
    else:
        rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        named = program.contender.startswith("=")
        row["contender"] = program.contender[1:] if named else row[program.contender]
        lacking = {*program.cell, *program.measured} - row.keys()
        if lacking and not row.get("skipped"):
            raise ScenarioError(f"benchmarks/{program.name}.py wrote no {lacking} in {row}")
    return rows


def records(
    suite: Suite, scenario: Scenario, rows: Sequence[dict[str, Any]], stamp: Stamp
) -> list[Record]:
    """Make a record of each row, and of each contender of the suite that cannot run here."""
    program = suite.programs[scenario.program]

    def new(contender: str, **more: Any) -> Record:
        shared = {name: getattr(stamp, name) for name in Stamp.__slots__}
        how = contenders.find(contender).command
        names = {"suite": suite.name, "scenario": scenario.name, "contender": contender}
        return Record(**names, how=how, **({"cell": Cell(), "values": {}} | shared | more))

    found: list[Record] = []
    for row in rows:
        wrong = row.get("wrong") or ""
        if program.right and row.get(program.right) is False:
            wrong = f"{program.right.replace('_', ' ')}: no"
        skipped = row.get("skipped") or ""
        found.append(
            new(
                row["contender"],
                cell={name: row.get(name) for name in program.cell},
                values={} if wrong or skipped else _values(row, program),
                wrong=wrong,
                skipped=skipped,
                peak_memory=row.get("peak_memory") or stamp.peak_memory,
            )
        )
    for name in suite.contenders:
        reason = contenders.why_absent(contenders.find(name))
        if reason and not any(contenders.find(one.contender).name == name for one in found):
            found.append(new(name, skipped=reason, peak_memory=None))
    return found


def _values(row: dict[str, Any], program: Program) -> dict[str, Value]:
    """Read what was measured; a spread is that of the first field, or by field."""
    spread = row.get(program.spread) or {}
    if not isinstance(spread, dict):
        spread = {program.measured[0]: spread}
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


def _spawn(command: Sequence[str], limit: float, quiet: bool) -> tuple[str, int | None]:
    """Run a program; gives why it failed, or nothing, and the bytes it had resident at most."""
    with tempfile.TemporaryFile("w+") as said:
        output: Any = said if quiet else None
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT if quiet else None,
            start_new_session=True,
        )
        stop = partial(os.killpg, process.pid, signal.SIGKILL)  # what it started, too
        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            stop()
            raise
        finally:
            in_time = timer.is_alive()
            timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode == 0:
            return "", usage.ru_maxrss << 10
        said.seek(0)
        last = "".join(said.readlines()[-12:])
    if not in_time:
        return f"not done after {limit:.0f} s", None
    return f"exit status {process.returncode} of {shlex.join(command)}\n{last}".strip(), None

"""Run the scenarios of suites, each in a fresh process of its own."""

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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.harness import machine
from benchmarks.harness.machine import ROOT, Machine
from benchmarks.harness.record import Record
from benchmarks.harness.rows import Run, read_rows, records, seen_by, wrong_of_ours
from benchmarks.harness.scenario import Scenario, Suite

QUICK_MINUTES = 15
"""After which a quick scenario hangs: it takes seconds, but a busy machine is no failure."""


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
class Ended:
    """A process that is done."""

    failure: str
    peak_memory: int
    """Bytes that it had resident at most."""


def run(suites: Sequence[Suite], quick: bool) -> Iterator[Ran]:
    """Run all scenarios, one after the other; quick ones side by side, as their times are not told.

    Rates of the machine are measured before each scenario of a full run.
    """
    scenarios = [
        (suite, one) for suite in suites for one in suite.scenarios if not quick or one.quick
    ]
    here = machine.measure_apart(rates=False) if quick else None
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores if quick else 1) as pool:
        jobs = [pool.submit(run_scenario, suite, one, here) for suite, one in scenarios]
        for job in jobs:
            yield job.result()


def run_scenario(suite: Suite, scenario: Scenario, quick_on: Machine | None) -> Ran:
    """Run a scenario: quickly on the machine given, or fully on this one, measured before."""
    quick = quick_on is not None
    options = shlex.split((scenario.quick if quick else scenario.options) or "")
    typed = ["-m", f"benchmarks.{scenario.program}", *options]
    here, date = quick_on or machine.measure_apart(rates=True), machine.now()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        limit = 60 * (QUICK_MINUTES if quick else scenario.minutes)
        ended = _spawn([sys.executable, *typed, "--json", str(file)], limit, quiet=quick)
        one = Run(
            suite=suite,
            scenario=scenario,
            command=f"python {shlex.join(typed)}",
            date=date,
            commit=machine.commit(),
            machine=here,
            quick=quick,
            peak_memory=ended.peak_memory,
        )
        failure, found = ended.failure, list[Record]()
        try:
            one = replace(one, machine=seen_by(file, one.program, here))
            found = records(one, read_rows(file, one.program))
        except (OSError, KeyError, ValueError) as error:
            failure = failure or f"{type(error).__name__}: {error}"
    return Ran(
        suite=suite.name,
        scenario=scenario.name,
        seconds=time.perf_counter() - start,
        records=tuple(found),
        failure=failure or wrong_of_ours(found),
    )


def _spawn(command: Sequence[str], limit: float, quiet: bool) -> Ended:
    """Run a program to its end, or for so many seconds; what it says is kept if it is quiet."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ({"OMP_NUM_THREADS": "1"} if quiet else {}),  # others run beside it
            stdout=said if quiet else None,
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
        said.seek(0)
        last = "".join(said.readlines()[-12:])
    failure = ""
    if not in_time:
        failure = f"not done after {limit:.0f} s"
    elif process.returncode:
        failure = f"exit status {process.returncode} of {shlex.join(command)}\n{last}".strip()
    return Ended(failure=failure, peak_memory=usage.ru_maxrss << 10)

"""Run suites of benchmarks: what `moecc bench SUITE` does.

    python -m benchmarks.harness kernels --json kernels.jsonl
    python -m benchmarks.harness all --quick
    python -m benchmarks.harness kernels --kind int8 --tokens 1    # its program, with these options

Exit status is 1 where results of moecc are wrong or a program failed, and never for a time.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import compare, markdown, plots, record, scenario
from benchmarks.harness.errors import ScenarioError
from benchmarks.harness.record import Record
from benchmarks.harness.runner import Ran, run
from moecc.runtime.errors import MissingExtra

ALL = "all"


def main(given: Sequence[str] | None = None) -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(
        prog="moecc bench",
        description="Run a suite. What is no option here is handed to its first program instead of "
        "the scenarios' options (python -m benchmarks.PROGRAM --help).",
        epilog="\n".join(f"{one}: {scenario.read(one).about}" for one in scenario.names()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("suite", choices=[*scenario.names(), ALL], metavar="SUITE")
    parser.add_argument("--quick", action="store_true", help="check results, in seconds: no times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep records there, a line each")
    parser.add_argument("--scenario", metavar="NAME", help="run this one alone")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="say what changed since OLD")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw every measured field")
    arguments, own = parser.parse_known_args(given)
    try:
        suites = [scenario.read(one) for one in _names(arguments.suite)]
        old = record.read(arguments.compare) if arguments.compare else None
        if arguments.plot:
            plots.require()
    except (OSError, ValueError, MissingExtra) as error:
        parser.error(str(error))
    if arguments.scenario:
        suites = [one for suite in suites if (one := suite.alone(arguments.scenario)).scenarios]
        if not suites:
            parser.error(f"{arguments.suite} has no scenario {arguments.scenario!r}")
    if own and arguments.suite == ALL:
        parser.error(f"{shlex.join(own)}: only the program of one suite takes options of its own")
    if own:
        suites = [suites[0].with_options(shlex.join(own))]
    ran = _run(suites, arguments.quick, arguments.json)
    records = [one for each in ran for one in each.records]
    if old is not None:
        print("\n".join(compare.compare(old, records)))
    if arguments.plot:
        plots.plot(records, arguments.plot)
    return int(any(one.failure for one in ran))


def _names(suite: str) -> list[str]:
    return scenario.names() if suite == ALL else [suite]


def _run(suites: Sequence[scenario.Suite], quick: bool, file: Path | None) -> list[Ran]:
    """Run, say how each scenario went, and write after each what there is so far.

    Records of other scenarios, which a file has from another run, stay in it.
    """
    start, ran = time.perf_counter(), list[Ran]()
    now = {(suite.name, one.name) for suite in suites for one in suite.scenarios}
    kept = record.read(file) if file and file.exists() else []
    kept = [one for one in kept if (one.suite, one.scenario) not in now]
    for one in run(suites, quick):
        ran.append(one)
        print(f"{one.suite} {one.scenario}: {_summary(one)}", flush=True)
        if not quick:
            print("\n".join(markdown.tables(one.records)), flush=True)
        if file:
            record.write([*kept, *(each for done in ran for each in done.records)], file)
    wrong = [f"{one.suite} {one.scenario}" for one in ran if one.failure]
    said = f"wrong or failed: {', '.join(wrong)}" if wrong else "no result is wrong"
    print(f"{len(ran)} scenarios in {time.perf_counter() - start:.0f} s: {said}")
    return ran


def _summary(one: Ran) -> str:
    measured = sum(bool(each.values) for each in one.records)
    lines = [f"{(one.failure and 'FAILED') or 'ok'}, {measured} measured, {one.seconds:.0f} s"]
    lines += [f"    {one.failure}"] if one.failure else []
    lines += dict.fromkeys(_aside(each) for each in one.records if each.skipped or each.wrong)
    return "\n".join(lines)


def _aside(one: Record) -> str:
    said = f"skipped, {one.skipped}" if one.skipped else f"no time, {one.wrong}"
    return f"    {one.contender}: {said}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ScenarioError as error:
        print(f"moecc bench: {error}", file=sys.stderr)
        sys.exit(2)

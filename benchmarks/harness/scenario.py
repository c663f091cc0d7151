"""Read scenarios: which programs a suite runs, with which options, and how their rows are read.

A suite is `benchmarks/scenarios/SUITE.toml`:

    about = "One line."
    contenders = ["moecc", "llama.cpp"]         # those that cannot run here are told as skipped

    [programs.kernels]                          # benchmarks/kernels.py, which writes --json FILE
    cell = ["kind", "tokens"]                   # fields that tell the rows of a contender apart
    less = ["milliseconds"]                     # measured fields that are better when small
    more = ["tokens_per_second"]                # and when large

    [[scenario]]
    name = "qwen3-30b-a3b"
    program = "kernels"
    options = "--kind bf16,int8"
    quick = "--kind int8 --seconds 0.01"        # without, it is no part of --quick
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import ScenarioError, check_keys

FOLDER = Path(__file__).parents[1] / "scenarios"
CONTENDERS = "contenders"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How to read what a program writes."""

    name: str
    rows: str = "results"
    """The list of rows in its JSON; nothing if the file has a row a line."""
    contender: str = "contender"
    """The field that names who was measured, or `=NAME` if it is always the same."""
    cell: tuple[str, ...] = ()
    less: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    spread: str = "spread"
    """A field with the smallest and the largest: of the first measured field, or by their names."""
    right: str = ""
    """A field that is false where the results are wrong."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Name the measured fields, rates before times and sizes."""
        return (*self.more, *self.less)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run of a program."""

    name: str
    program: str
    options: str
    quick: str | None = None
    minutes: float = 60.0
    """After which a full run is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What answers one question."""

    name: str
    about: str
    contenders: tuple[str, ...]
    programs: Mapping[str, Program]
    scenarios: tuple[Scenario, ...]

    def alone(self, scenario: str) -> "Suite":
        """Give the suite with this scenario alone, or with none."""
        return replace(self, scenarios=tuple(one for one in self.scenarios if one.name == scenario))

    def with_options(self, options: str) -> "Suite":
        """Give the suite with its first scenario alone, with these options in place of its own."""
        own = replace(self.scenarios[0], name="own options", options=options, quick=options)
        return replace(self, scenarios=(own,))


def names() -> list[str]:
    """Name the suites."""
    return sorted(file.stem for file in FOLDER.glob("*.toml") if file.stem != CONTENDERS)


def read(name: str) -> Suite:
    """Read a suite; raises `ScenarioError` saying what is wrong and where."""
    file = FOLDER / f"{name}.toml"
    if name not in names():
        raise ScenarioError(f"no suite {name!r}; there are {names()}")
    try:
        told = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{file.name} is not TOML: {error}") from error
    if unknown := told.keys() - {"about", "contenders", "programs", "scenario"}:
        raise ScenarioError(f"{file.name} has unknown keys {sorted(unknown)}")
    programs = {
        program: _program(program, table, file.name)
        for program, table in told.get("programs", {}).items()
    }
    scenarios = tuple(_scenario(table, programs, file.name) for table in told.get("scenario", []))
    if not scenarios:
        raise ScenarioError(f"{file.name} has no [[scenario]]")
    return Suite(
        name=name,
        about=told.get("about", ""),
        contenders=tuple(told.get("contenders", ())),
        programs=programs,
        scenarios=scenarios,
    )


def _program(name: str, table: dict[str, Any], file: str) -> Program:
    check_keys(table, Program, f"[programs.{name}] in {file}", given={"name"})
    if not (FOLDER.parent / f"{name}.py").exists():
        raise ScenarioError(f"[programs.{name}] in {file}: there is no benchmarks/{name}.py")
    lists = ("cell", "less", "more")
    held: dict[str, Any] = {**table, **{key: tuple(table.get(key, ())) for key in lists}}
    return Program(name=name, **held)


def _scenario(table: dict[str, Any], programs: Mapping[str, Program], file: str) -> Scenario:
    where = f"scenario {table.get('name', '')!r} in {file}"
    check_keys(table, Scenario, where)
    if table["program"] not in programs:
        raise ScenarioError(
            f"{where} names program {table['program']!r}; there are {sorted(programs)}"
        )
    return Scenario(**table)

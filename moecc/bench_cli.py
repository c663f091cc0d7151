"""The command that runs the benchmarks of a checkout."""

import ast
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moecc.arguments import AsJson
from moecc.runtime.errors import OptionError
from moecc.terminal import show

app = typer.Typer(rich_markup_mode="rich")
FOLDER = Path(__file__).parent.parent / "benchmarks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A suite of the harness, or one of its programs."""

    name: str
    about: str
    suite: bool


def complete_benchmark(incomplete: str) -> list[str]:
    """Give the benchmarks that begin so."""
    return [one.name for one in benchmarks() if one.name.startswith(incomplete)]


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,  # what follows NAME is the benchmark's
    },
    epilog="Examples: [b]moecc bench[/b] · [b]moecc bench all --quick[/b] · "
    "[b]moecc bench kernels --json new.jsonl --compare old.jsonl[/b] · "
    "[b]moecc bench layer --isa avx2[/b] · [b]moecc bench decoder --help[/b]",
)
def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="A suite, a program, or all suites; without, they are listed.",
            metavar="NAME",
            show_default=False,
            autocompletion=complete_benchmark,
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the benchmarks of this checkout, or run one with the options behind its name.

    A suite takes --quick, --json FILE, --compare OLD and --plot FOLDER, or the options of its first
    program. Exit status is that of the benchmark: of a suite 1 if results are wrong, never for a
    time.
    """
    found = benchmarks()
    if not found:
        raise OptionError(
            f"there is no {str(FOLDER)!r}: benchmarks are run from a checkout, which is what "
            "`pip install -e .` installs"
        )
    if not name:
        show(found, as_json, print_benchmarks)
    elif name not in (one.name for one in found):
        raise OptionError(f"no benchmark {name!r}; there are {[one.name for one in found]}")
    else:
        path = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))
        is_suite = next(one.suite for one in found if one.name == name)
        module = ["benchmarks.harness", name] if is_suite else [f"benchmarks.{name}"]
        command = [sys.executable, "-m", *module, *context.args]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False)
        raise typer.Exit(done.returncode)


def benchmarks() -> list[Benchmark]:
    """Find suites and programs, with the first line of what they say of themselves.

    A program with the name of a suite is run by that.
    """
    files = sorted((FOLDER / "scenarios").glob("*.toml"))
    told = {file.stem: tomllib.loads(file.read_text()).get("about") for file in files}
    suites = {name: str(about) for name, about in told.items() if isinstance(about, str)}
    if suites:
        suites["all"] = "Run all suites."
    texts = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.py"))}
    programs = {
        name: (ast.get_docstring(ast.parse(text)) or name).splitlines()[0]
        for name, text in texts.items()
        if "__main__" in text and name not in suites
    }
    return [
        Benchmark(name=name, about=about, suite=of is suites)
        for of in (suites, programs)
        for name, about in of.items()
    ]


def print_benchmarks(found: list[Benchmark], console: Console) -> None:
    """Print a line for each, suites first."""
    width = max(len(one.name) for one in found)
    for title, kind in (("Suites", True), ("Programs", False)):
        lines = [f"  {one.name:<{width}}  {one.about}" for one in found if one.suite is kind]
        if lines:
            text = "\n".join([title, *lines])
            console.print(text, markup=False, highlight=False, soft_wrap=True)

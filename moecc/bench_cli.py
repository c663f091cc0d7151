"""The command that runs the benchmarks of a checkout."""

import ast
import os
import subprocess
import sys
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
    """A program of the harness."""

    name: str
    about: str


def complete_benchmark(incomplete: str) -> list[str]:
    """Give the benchmarks that begin so."""
    return [one.name for one in benchmarks() if one.name.startswith(incomplete)]


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,  # what follows NAME is the benchmark's
    },
    epilog="Examples: [b]moecc bench[/b] · [b]moecc bench layer --isa avx2[/b] · "
    "[b]moecc bench decoder --help[/b]",
)
def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="Which; without, all are listed.",
            metavar="NAME",
            show_default=False,
            autocompletion=complete_benchmark,
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the benchmarks of this checkout, or run one with the options behind its name.

    Exit status is that of the benchmark.
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
        command = [sys.executable, "-m", f"benchmarks.{name}", *context.args]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False)
        raise typer.Exit(done.returncode)


def benchmarks() -> list[Benchmark]:
    """Find those that can be run, with the first line of what they say of themselves."""
    texts = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.py"))}
    return [
        Benchmark(name=name, about=(ast.get_docstring(ast.parse(text)) or name).splitlines()[0])
        for name, text in texts.items()
        if "__main__" in text
    ]


def print_benchmarks(found: list[Benchmark], console: Console) -> None:
    """Print a line for each."""
    width = max(len(one.name) for one in found)
    for one in found:
        line = f"{one.name:<{width}}  {one.about}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

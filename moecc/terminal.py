"""Talk to a person or to a program: text, JSON, and a line that says what is going on."""

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moecc.plain import plain

WIDTH = 110
"""Of what goes to a file or a pipe."""

Tell = Callable[[str], None]
"""Changes the line that says what is going on."""
Watch = Callable[[int, float], None]
"""Called after each new token with the count so far and the seconds that it took."""
Result = TypeVar("Result")
_told: list[Tell] = []
"""What changes the line that is on the terminal now, if there is one."""


def show(result: Result, as_json: bool, print_text: Callable[[Result, Console], None]) -> None:
    """Print a command's result to stdout."""
    if as_json:
        typer.echo(json.dumps(plain(result), indent=2))
    else:
        print_text(result, stdout())


def stdout() -> Console:
    """Give stdout, with colours and its own width if it is a terminal (`NO_COLOR` is kept to)."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def stderr(quiet: bool = False) -> Console:
    """Give stderr for what comes and goes: quiet unless it is a terminal."""
    console = Console(stderr=True)
    console.quiet = quiet or not console.is_terminal
    return console


@contextmanager
def live_line(first: str, quiet: bool = False) -> Generator[Tell]:
    """Keep a line on a terminal's stderr; gives a function that changes it.

    Where there is one already, that is it: a terminal shows one.
    """
    if _told:
        yield _told[-1]
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    seen = sys.stdout.isatty()  # what is printed goes above the line; a pipe gets its own
    console = stderr(quiet)
    with Progress(*columns, console=console, transient=True, redirect_stdout=seen) as bar:
        task = bar.add_task(first, total=None)
        _told.append(lambda line: bar.update(task, description=line))
        try:
            yield _told[-1]
        finally:
            _told.clear()


def counting(tell: Tell, new_tokens: int, what: str) -> Watch:
    """Tell how many of so many new tokens there are, and how fast they come."""

    def show_count(count: int, seconds: float) -> None:
        rate = count / seconds if seconds else 0.0
        tell(f"{what}: {count}/{new_tokens} tokens, {rate:.0f} tokens/s")

    return show_count

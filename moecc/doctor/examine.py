"""Go through every group of checks, and print what they found."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecc.doctor.blocks import blocks
from moecc.doctor.check import Check
from moecc.doctor.compiler import compiler
from moecc.doctor.gpus import gpus
from moecc.doctor.memory import memory
from moecc.doctor.storage import storage
from moecc.doctor.versions import versions

GROUPS: tuple[Callable[[], Iterator[Check]], ...] = (
    versions,
    compiler,
    memory,
    storage,
    gpus,
    blocks,  # last: what is wrong with a block was likely told by then
)
_STYLES = {"ok": "green", "limited": "yellow", "broken": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What was found, in the order of the groups."""

    checks: tuple[Check, ...]

    @property
    def broken(self) -> int:
        """Things that have to be mended."""
        return sum(check.status == "broken" for check in self.checks)

    @property
    def limited(self) -> int:
        """Things that would work better otherwise."""
        return sum(check.status == "limited" for check in self.checks)


def examine(tell: Callable[[str], None]) -> Examined:
    """Check everything, telling what is looked at."""
    found: list[Check] = []
    for group in GROUPS:
        tell(f"looking at {group.__name__}")
        found += group()
    return Examined(checks=tuple(found))


def print_examined(seen: Examined, console: Console) -> None:
    """Print a line for each check, and the fix below those that need one."""
    table = Table.grid(padding=(0, 2))
    for check in seen.checks:
        table.add_row(Text(check.status, _STYLES[check.status]), check.name, Text(check.found))
        if check.fix:
            table.add_row("", "", Text(f"to mend it: {check.fix}", "bold"))
    console.print(table, highlight=False)
    if seen.broken or seen.limited:
        console.print(f"\n{seen.broken} broken, {seen.limited} limited", highlight=False)
    else:
        console.print("\neverything works")

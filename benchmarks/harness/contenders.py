"""Know every contender: how it is run, and why it cannot run here.

The facts are in `benchmarks/scenarios/contenders.toml`; the code that runs one is in the programs.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness.errors import ScenarioError, check_keys

FILE = Path(__file__).parents[1] / "scenarios" / "contenders.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """What takes part, by its name or by how its name begins."""

    name: str
    command: str
    """What runs it, with the settings that matter."""
    ours: bool = False
    """Wrong results of it fail a run; those of others only have no time."""
    module: str = ""
    """What has to be importable."""
    install: str = ""
    gpu: bool = False
    """It needs a CUDA device."""


@cache
def known(file: Path = FILE) -> Mapping[str, Contender]:
    """Read all contenders, by name."""
    tables = tomllib.loads(file.read_text())
    for name, table in tables.items():
        check_keys(table, Contender, f"contender {name!r} in {file.name}", given={"name"})
    return {name: Contender(name=name, **table) for name, table in tables.items()}


def find(name: str) -> Contender:
    """Find the contender that a row's name begins with: the longest that is known.

    Raises `ScenarioError` if there is none: whatever is timed says how it was run.
    """
    found = [one for one in known() if name == one or name.startswith(f"{one} ")]
    if not found:
        raise ScenarioError(
            f"contender {name!r} is not in {FILE.name}: add a table [{name!r}] with its command"
        )
    return known()[max(found, key=len)]


def why_absent(contender: Contender) -> str:
    """Say why it cannot run here, or nothing."""
    if contender.gpu and not _has_gpu():
        return "needs a CUDA device"
    if contender.module and find_spec(contender.module) is None:
        return f"{contender.module} is not installed: {contender.install}"
    return ""


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

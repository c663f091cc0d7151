"""The README's commands are commands, and what it shows of them is what they print."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from moecc import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
_SHOWN = re.compile(r"^\$ (moecc .*)\n((?:(?!\$ |```).*\n)*)", re.MULTILINE)


def blocks(text: str, language: str) -> Iterator[str]:
    """Give what stands in fences of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return (inside for name, inside in found if name == language)


def shown() -> list[tuple[str, str]]:
    """List the commands whose output the README shows, with that."""
    return [one for block in blocks(README, "console") for one in _SHOWN.findall(block)]


def commands() -> list[str]:
    """List every line that begins with moecc, in the README and in examples of the help."""
    group: Any = get_command(cli.app)
    told = [one for each in group.commands.values() for one in each.epilog.split("[b]")[1:]]
    lines = [line for block in blocks(README, "") for line in block.splitlines()]
    lines += [one.partition("[/b]")[0] for one in told] + [command for command, _ in shown()]
    return list(dict.fromkeys(line for line in lines if line.startswith("moecc ")))


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one_that_there_is(command: str) -> None:
    group: Any = get_command(cli.app)
    _, name, *arguments = shlex.split(command, comments=True)
    assert name in group.commands
    group.commands[name].make_context(name, arguments)  # raises what a person would see


def normalised(text: str) -> list[str]:
    """Leave out versions' line numbers and how wide tables are."""
    text = re.sub(r"(modeling_\w+\.py):\d+", r"\1", text).strip()
    return [re.sub(r"(?<=\S)  +", "  ", line).rstrip() for line in text.splitlines()]


@pytest.mark.parametrize(("command", "printed"), shown())
def test_what_is_shown_is_what_is_printed(command: str, printed: str) -> None:
    result = CliRunner().invoke(cli.app, shlex.split(command)[1:], catch_exceptions=False)
    assert normalised(result.stdout) == normalised(printed)


def test_something_is_shown() -> None:
    assert {command.split()[1] for command, _ in shown()} == {"why", "plan"}

"""`moecc why` tells what was matched, what was not, where, and what would help."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moecc import cli
from moecc.reasons import _ADVICE, _DEFAULT  # pyright: ignore[reportPrivateUsage]

FACTORY = """
import torch
from torch import nn
from tests.loops import HIDDEN, WhereLoop
from tests.models import GroupedMoe
from tests.test_module_experts import Skewed

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.good, self.bad = WhereLoop(), Skewed()

    def forward(self, x):
        return self.bad(self.good(x))

class Torn(GroupedMoe):
    def activate(self, rows):
        return super().activate(rows.cumsum(-1))

def both():
    return Both(), (torch.randn(12, HIDDEN),)

def torn():
    return Torn(), (torch.randn(6, 16, dtype=torch.bfloat16),)

def dense():
    return nn.Linear(4, 4), (torch.randn(2, 4),)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "factory.py"
    path.write_text(FACTORY)
    return str(path)


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["why", *args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_loop_that_stays_says_why_and_what_would_help(file: str) -> None:
    status, text = run(f"{file}:both")
    assert status == 1
    assert "matched good" in text
    assert "not matched bad" in text
    assert "its experts stay a loop" in text
    assert "to match: " in text


def test_a_near_miss_names_the_node_and_the_line(file: str) -> None:
    status, text = run(f"{file}:torn", "--json")
    (answer,) = json.loads(text)
    assert status == 1
    assert not answer["matched"]
    assert "stopped at cumsum" in answer["reason"]
    assert answer["node"]
    assert ".py:" in answer["source"]
    assert answer["advice"]


def test_a_path_narrows_the_answer(file: str) -> None:
    status, text = run(f"{file}:both", "good")
    assert status == 0
    assert "bad" not in text


def test_a_path_without_candidates_is_wrong_use(file: str) -> None:
    result = CliRunner().invoke(cli.app, ["why", f"{file}:both", "elsewhere"])
    assert "nothing under 'elsewhere' looks like a MoE block; there is" in str(result.exception)


def test_a_dense_model_has_nothing_to_explain(file: str) -> None:
    status, text = run(f"{file}:dense")
    assert status == 1
    assert "nothing in this model looks like a MoE block" in text


def test_every_advice_belongs_to_a_reason_that_is_given() -> None:
    """A pattern that no message in the sources could match is dead."""
    import re

    root = Path(__file__).parents[1]
    folders = ("moecc", "passes", "codegen", "runtime")
    sources = " ".join(
        file.read_text() for folder in folders for file in (root / folder).rglob("*.py")
        if file.name != "reasons.py"
    )  # fmt: skip
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    dead = [pattern for pattern, _ in _ADVICE if not re.search(pattern, joined)]
    assert not dead
    assert _DEFAULT

"""The command line as a person uses it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moecc import cli
from moecc.runtime.errors import OptionError

FACTORY = """
import torch
from torch import nn
from tests.models import Dense, GroupedMoe

def moe():
    return GroupedMoe(), (torch.randn(6, 16, dtype=torch.bfloat16),)

def dense():
    return Dense(), [torch.randn(4, 16)]

def nothing():
    return 3
"""


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, args)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def factory(tmp_path: Path) -> str:
    file = tmp_path / "factory.py"
    file.write_text(FACTORY)
    return str(file)


def test_passes_takes_a_factory_and_shows_a_diff(factory: str) -> None:
    status, text = run("passes", f"{factory}:moe", "--diff", "fuse_experts")
    assert status == 0
    assert "+%experts = moecc.experts(" in text
    assert "-%sort = sort(" in text


def test_passes_dumps_graphs_and_kernels(factory: str, tmp_path: Path) -> None:
    assert run("passes", f"{factory}:moe", "--dump", str(tmp_path / "out"))[0] == 0
    names = {file.name for file in (tmp_path / "out" / "graph0").iterdir()}
    assert {"01_detect_moe.before.txt", "07_lower.after.txt", "kernel0.txt"} <= names


def test_a_model_without_blocks_is_a_problem(factory: str) -> None:
    status, text = run("passes", f"{factory}:dense")
    assert status == 1
    assert "no MoE block found" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("passes", "no_such_type"), "no model type"),
        (("passes", "nowhere.py:make"), "there is no file"),
        (("passes", "{factory}:gone"), "has no 'gone'"),
        (("passes", "{factory}:nothing"), "returned a int"),
        (("passes", "{factory}:moe", "--diff", "polish"), "is not a pass"),
        (("passes", "{factory}:moe", "--kernels", "cuda"), "'cuda' is not one of"),
        (("passes", "qwen3_moe", "--dtype", "int3"), "int3"),
        (("run", "qwen3_moe", "-p", "x"), "has no tokenizer"),
        (("run", "no/such-checkpoint", "-p", "x"), "cannot download"),
    ],
)
def test_wrong_use_is_status_2_and_says_what_to_do(
    args: tuple[str, ...],
    message: str,
    factory: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["moecc", *(arg.format(factory=factory) for arg in args)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_run_needs_a_prompt() -> None:
    assert run("run", "qwen3_moe")[0] == 2


def test_kernels_are_planned_and_compiled_for_a_gpu_that_is_not_here(factory: str) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    code, output = run("kernels", f"{factory}:moe", "--tokens", "1,1000000", "--json")
    assert code == 0
    (found,) = json.loads(output)
    first, last = found["chosen"]
    names = [one.split()[0] for one in first["kernels"]]
    assert (first["plan"], names[:2]) == ("decode", ["choose_experts", "decode_gate_up"])
    assert last["plan"].startswith("persistent")
    assert "T" in found["costs"]["decode"]
    assert {row["kernel"] for row in found["resources"]} == {*first["kernels"], *last["kernels"]}
    assert all(row["spilled"] == 0 < row["registers"] for row in found["resources"])


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (("--target", "sm_10"), "sm_10"),
        (("--tokens", "1,x"), "1,x"),
        (("--quantize", "int5"), "int5"),
    ],
    ids=lambda one: one[0][0] if isinstance(one, tuple) else one,
)
def test_kernels_refuses_what_it_does_not_know(
    factory: str, option: tuple[str, str], reason: str
) -> None:
    with pytest.raises(OptionError, match=reason):
        run("kernels", f"{factory}:moe", *option)

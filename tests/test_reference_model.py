"""The trained model that ships with the project: real text, real routing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig
from typer.testing import CliRunner

from moecc import cli

MODEL = Path(__file__).parent.parent / "benchmarks" / "reference"
SETTINGS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
OPTIONS = {"inner": "eager"}
PROMPTS = ("In the beginning", '"My dear Emma," said Mr. Knightley,', "    def close(self):\n")


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    model = load()
    return {prompt: model.generate(encode(prompt), **SETTINGS) for prompt in PROMPTS}


def encode(prompt: str) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(MODEL)(prompt, return_tensors="pt").input_ids


def test_it_gives_the_same_tokens_through_every_road(expected: dict[str, torch.Tensor]) -> None:
    forward, module = load(), load()
    forward.forward = torch.compile(forward.forward, backend="moecc", dynamic=True, options=OPTIONS)
    compiled: Any = torch.compile(module, backend="moecc", options=OPTIONS)
    for prompt, tokens in expected.items():
        assert torch.equal(forward.generate(encode(prompt), **SETTINGS), tokens)
        assert torch.equal(compiled.generate(encode(prompt), **SETTINGS), tokens)


def test_it_gives_the_same_tokens_through_compile_config(
    expected: dict[str, torch.Tensor],
) -> None:
    model = load()
    config = CompileConfig(backend="moecc", options=OPTIONS, mode=None)
    config._compile_all_devices = True  # transformers compiles on GPUs only, unless told
    static = {"cache_implementation": "static", "compile_config": config}
    for prompt, tokens in expected.items():
        assert torch.equal(model.generate(encode(prompt), **static, **SETTINGS), tokens)


def test_run_generates_compares_and_times() -> None:
    args = ["run", str(MODEL), "-p", PROMPTS[0], "-n", "8", "--rounds", "1", "--dtype", "float32"]
    result = CliRunner().invoke(cli.app, [*args, "--json"])
    shown = json.loads(result.stdout)
    assert result.exit_code == 0
    assert shown["same_tokens"]
    assert shown["text"]
    assert len(shown["comparison"]["moecc"][0]["tokens"]) == 8
    assert {len(graph["blocks"]) for graph in shown["report"]["graphs"]} == {6}


def test_it_fits_into_16_megabytes() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 16e6

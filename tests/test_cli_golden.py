"""What every command prints, as text and as JSON; work that both share is done once."""

import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moecc import (
    cli,
    demo,
    generate,
    inspection,
    kernel_plans,
    offload_demo,
    packing,
    profiling,
    tracing,
)
from moecc.doctor import examine
from moecc.doctor.check import broken, limited, ok
from moecc.tiny import tiny_model
from tests.cli_page import RESULTS, check

REFERENCE = Path(__file__).parent.parent / "benchmarks" / "reference"
PROMPT = ("-p", "In the beginning God created")
COMMANDS = {
    "passes": ("passes", "qwen3_moe"),
    "why": ("why", "qwen3_moe"),
    "kernels": ("kernels", "qwen3_moe", "--tokens", "1", "--dtype", "bfloat16"),
    "plan": ("plan", "deepseek_v3", "--memory", "80GiB"),
    "run": ("run", "tiny", *PROMPT, "-n", "4", "--rounds", "1"),
    "run-lent": ("run", "tiny", *PROMPT, "-n", "4", "--rounds", "1", "--expert-memory", "50%"),
    "trace": (
        "trace", "tiny", *PROMPT, "-n", "4", "-o", "t.jsonl", "--expert-memory", "50%",
        "--lookahead", "0",
    ),
    "replay": ("replay", "t.jsonl", "--policy", "lru,belady", "--memory", "own,25%"),
    "profile": ("profile", "tiny", *PROMPT, "-n", "8", "-o", "here.toml"),
    "pack": ("pack", "tiny", "-o", "packed", "--quantize", "int4"),
    "doctor": ("doctor",),
}  # fmt: skip
_TIMED = {"passes", "run", "run-lent", "pack", "profile", "trace"}
"""Commands with times, which differ from run to run."""
_RACING = {"run-lent", "profile"}
"""Commands whose every figure may: which reads came in time, what is measured."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Do what commands do once for the same arguments, without inductor, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        inner = generate.compiled
        for module in (generate, offload_demo, profiling, tracing):
            patch.setattr(module, "compiled", lambda m, known: inner(m, known | {"inner": "eager"}))
        for module, name in (
            (inspection, "inspect"), (kernel_plans, "explain"), (demo, "run"), (packing, "run"),
            (offload_demo, "run"), (tracing, "run"), (profiling, "run"),
        ):  # fmt: skip
            patch.setattr(module, name, remembered(getattr(module, name)))
        patch.setattr(kernel_plans, "inspect", inspection.inspect)
        patch.setattr(examine, "GROUPS", (machine,))
        folder = tmp_path_factory.mktemp("work")
        write_tiny(folder / "tiny")
        patch.chdir(folder)
        yield patch


def write_tiny(folder: Path) -> None:
    """Write a checkpoint of two layers, with the shipped model's tokenizer."""
    size = json.loads((REFERENCE / "config.json").read_text())["vocab_size"]
    tiny_model("qwen3_moe", vocab_size=size, max_position_embeddings=512).save_pretrained(folder)
    for file in REFERENCE.glob("tokenizer*"):
        shutil.copy(file, folder)


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function once for the same arguments, whoever wants to be quiet."""
    known: dict[str, Any] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        key = repr(bound.arguments | {"quiet": None})
        if key not in known:
            known[key] = function(*args, **kwargs)
        return known[key]

    return call


def machine() -> Any:
    yield ok("memory", "8.0 of 16.0 GB available, read at 25.0 GB/s", measured=25e9)
    yield limited("transformers", "not installed", "pip install 'moecc[transformers]'")
    yield broken("torch", "2.1.0, older than 2.9", "pip install -U 'torch>=2.9'")


def invoke(name: str, *more: str) -> tuple[int, str]:
    if name == "kernels":
        pytest.importorskip("triton", reason="triton has no wheel for this platform")
    result = CliRunner().invoke(cli.app, [*COMMANDS[name], *more], catch_exceptions=False)
    return result.exit_code, result.stdout


def normalised(text: str, name: str) -> str:
    """Leave out what differs between machines and versions, and how wide tables are."""
    text = re.sub(r"(modeling_\w+\.py):\d+", r"\1:LINE", text)
    text = re.sub(r"\b0\.1\.0 · torch \S+", "VERSION · torch VERSION", text)
    if name in _TIMED:
        text = re.sub(r"\d[\d,]*\.\d+(e[-+]\d+)?", "0.0", text)
        text = re.sub(r"\d+ s\b", "0 s", text)
    if name in _RACING:
        text = re.sub(r"\b\d+(\.\d+)?(e[-+]?\d+\b)?", "0", text)
    lines = [re.sub(r"(?<=\S)  +", "  ", line).rstrip() for line in text.splitlines()]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_text(name: str, shared: object, golden: Callable[[str], None]) -> None:
    status, text = invoke(name)
    assert status == (1 if name == "doctor" else 0)
    golden(normalised(text, name))


def cut(value: Any, timed: bool, name: str = "") -> Any:
    """Keep the first entry of each list, and no figure that differs from run to run."""
    if name == "guesses" and value:
        return list(value)  # what they gain is timed, or not known yet
    if isinstance(value, dict):
        return {key: cut(one, timed, key) for key, one in value.items()}
    if isinstance(value, list):
        rest = [f"and {len(value) - 1} more"] if len(value) > 1 else []
        return [cut(one, timed) for one in value[:1]] + rest
    if (isinstance(value, float) and timed) or name in ("version", "torch", "decode_rate"):
        return type(value)()
    if isinstance(value, str) and len(value) > 400:
        return f"{value[:60]}…"
    return value


@pytest.mark.parametrize("name", COMMANDS)
def test_json(name: str, shared: object, golden: Callable[[str], None]) -> None:
    status, text = invoke(name, "--json")
    found = json.loads(text)
    assert status == (1 if name == "doctor" else 0)
    check(found, RESULTS[name.partition("-")[0]], name)
    shown = json.dumps(cut(found, name in _TIMED), indent=1, ensure_ascii=False)
    golden(normalised(shown, name))


def test_a_diff_and_dumped_graphs(shared: object, golden: Callable[[str], None]) -> None:
    status, text = invoke("passes", "--diff", "fuse_experts", "--dump", "graphs")
    assert status == 0
    golden(normalised(text, "passes"))
    found = json.loads(invoke("passes", "--diff", "lower_attention", "--json")[1])
    assert found == {"name": "lower_attention", "diff": ""}
    assert (Path("graphs") / "graph0" / "02_fuse_experts.after.txt").is_file()

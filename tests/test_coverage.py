"""Every MoE family of transformers has a tiny instance, is raised, and computes what eager does."""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.coverage_report import TOLERANCE, page, verdict
from benchmarks.family import counting_layers, examine, owns_experts
from moecc.records import all_records
from moecc.runtime.errors import ModelError
from moecc.tiny import tiny_model
from moecc.tiny_families import FAMILIES
from tests.models import relative_error

UNLIKE = {
    "aria": "mul(silu(gate), up)",  # weights stored input-major
    "beam": "mul(silu(gate), up)",  # activation in float32
    "deepseek_v4": "mul(silu(min(gate, 0.2)), min(max(up, -0.2), 0.2))",  # routed by token id
    "gemma4": "mul(gelu_tanh(gate), up)",  # a learned scale for each expert
    "granitemoehybrid": "mul(silu(gate), up)",  # state-space layers between
    "inkling": "mul(silu(gate), up)",  # shared experts weighted by the router
    "inkling2": (
        "mul(mul(mul(tanh(div(gate, 0.2)), 0.2), sigmoid(gate)), mul(tanh(div(up, 0.3)), 0.3))"
    ),
    "minimax_m3_vl": (
        "mul(add(min(max(up, -0.2), 0.2), 1.0), "
        "mul(min(gate, 0.2), sigmoid(mul(min(gate, 0.2), 1.702))))"
    ),
    "muse_spark": "mul(silu(gate), up)",  # a norm of each expert's output
    "nemotron_h": "square(relu(x))",  # no gate
    "openai_privacy_filter": (  # weights stored input-major, with biases
        "mul(add(min(max(up, -0.2), 0.2), 1.0), "
        "mul(min(gate, 0.2), sigmoid(mul(min(gate, 0.2), 1.702))))"
    ),
    "zaya": "mul(silu(gate), up)",  # one expert a token, or none
}
"""Families that write their experts or their routing each in another way, and their activations."""


def an_examined(**changes: Any) -> dict[str, Any]:
    calls = {"layers": 2, "raised": 2, "graphs": 1}
    return {
        "family": "any", "model": "AnyModel", "inner": "eager", "dtype": "float32",
        "prefill": calls, "decode": calls, "uncompiled": calls, "compiled": 6, "error": 1e-7,
        "misses": [], "seconds": 1.0,
    } | changes  # fmt: skip


@pytest.mark.parametrize("family", UNLIKE)
def test_every_layer_of_an_unlike_family_is_raised(family: str) -> None:
    model = tiny_model(family)
    tokens = torch.randint(3, 99, (2, 16))
    options = {"inner": "eager", "kernels": "torch"}
    before = len(all_records())
    with torch.no_grad():
        with counting_layers(model) as layers:
            expected = model(tokens)[0]
        got = torch.compile(model, backend="moecc", fullgraph=True, options=options)(tokens)[0]
    (record,) = all_records()[before:]
    assert [str(block.activation) for block in record.blocks] == [UNLIKE[family]] * len(layers)
    assert layers
    assert not any(miss.fallback for miss in record.misses)
    assert relative_error(got, expected) < TOLERANCE["float32"]


def test_every_family_has_a_tiny_instance() -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        parameters = list(model.parameters())
        assert sum(each.numel() * each.itemsize for each in parameters) < 50e6
        assert all(each.isfinite().all() for each in parameters)
        assert any(map(owns_experts, model.modules())), f"{family} has no MoE layer"


def test_seeds_give_the_same_model_and_other_seeds_another() -> None:
    first, same, other = (tiny_model("deepseek_v4", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "proj" in name)


def test_a_model_that_would_not_be_tiny_is_refused_before_it_is_made() -> None:
    with pytest.raises(ModelError, match="parameters; name the size"):
        tiny_model("qwen3_moe", vocab_size=10_000_000_000)


def test_no_family_of_the_installed_transformers_is_forgotten() -> None:
    if not version("transformers").startswith("5.23."):
        pytest.skip("the table is of transformers 5.23")
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    files = Path(spec.origin).parent.glob("models/*/modeling_*.py")
    mark = "@use_experts_implementation"
    marked = {file.parent.name for file in files if mark in file.read_text()}
    assert len(marked) == 64
    assert marked <= set(FAMILIES)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "raised"),
        ({"decode": None}, "raised"),
        ({"decode": {"layers": 2, "raised": 1, "graphs": 1}}, "partly raised"),
        ({"uncompiled": {"layers": 2, "raised": 0, "graphs": 0}}, "partly raised"),
        ({"error": 2e-5}, "wrong"),
        ({"error": float("nan")}, "wrong"),
        ({"failure": "not done after 600 s"}, "wrong"),
    ],
)
def test_a_verdict_is_the_worst_of_the_calls(changes: dict[str, Any], expected: str) -> None:
    assert verdict(an_examined(**changes)) == expected


def test_a_family_without_fused_calls_is_not_raised() -> None:
    none = {"layers": 2, "raised": 0, "graphs": 1}
    assert verdict(an_examined(prefill=none, decode=none, uncompiled=none)) == "not raised"


def test_the_page_tells_failures_and_reasons() -> None:
    found = [
        an_examined(family="good", verdict="raised"),
        an_examined(family="odd", verdict="not raised", misses=["layers.0: stopped at a_b"]),
        {"family": "bad", "failure": "MemoryError", "verdict": "wrong"},
    ]
    text = page(found)
    assert "| good | AnyModel | 2 | 2 | 2 | 2 | 1 | 1e-07 |  |" in text
    assert "- layers.0: stopped at a\\_b" in text
    assert "| bad | | | | | | | | failed |" in text
    assert "- MemoryError" in text
    assert text.count("\n| raised | 1 |") == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_eager_computes(family: str) -> None:
    found = examine(family)
    assert found.error < TOLERANCE["float32"]
    assert json.dumps(found.misses)

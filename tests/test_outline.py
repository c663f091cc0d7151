"""Whole models whose layers are compiled once give what they give compiled whole."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moecc
from moecc.tiny import tiny_model

PROMPT = torch.arange(3, 35).view(2, 16)
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0
}  # fmt: skip
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
FOUR, SIX = ({"num_hidden_layers": count} for count in (4, 6))
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": SIX,
    "qwen3_moe": SIX,
    "deepseek_v3": SIX,  # dense first layers, latent attention
    "gpt_oss": SIX | {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "qwen3_next": SIX | {"layer_types": ["linear_attention", "full_attention"] * 3},
    "lfm2_moe": SIX | {"layer_types": ["conv", "full_attention"] * 3},
}


def compiled(model: Any, inner: str) -> Any:
    """Compile a model's forward, so that `generate` runs in graphs."""
    options = {"inner": inner, "kernels": "torch", "outline": True}
    model.forward = torch.compile(model.forward, backend="moecc", options=options)
    return model


def layers(model: Any) -> list[list[int]]:
    """Give, for each graph, how many layers each of its callees serves."""
    graphs = moecc.report(model).graphs
    return [[len(one["paths"]) for one in graph.callees] for graph in graphs]


def test_generates_the_same_tokens_with_a_cache_that_grows() -> None:
    expected = tiny_model("qwen3_moe", **FOUR).generate(PROMPT, **SETTINGS)
    model = compiled(tiny_model("qwen3_moe", **FOUR), "aot_eager")
    assert torch.equal(model.generate(PROMPT, **SETTINGS), expected)
    assert layers(model) == [[4], [4], [3]], "prefill, one token, tokens; caches have own symbols"
    assert "layers compiled once" in str(moecc.report(model))
    for graph in moecc.report(model).graphs:
        (callee,) = graph.callees
        assert len({*callee["paths"]}) == len(callee["paths"]), "each layer is named"


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_generate_the_same_tokens(family: str, cache: str) -> None:
    expected = tiny_model(family, **FAMILIES[family]).generate(PROMPT, **SETTINGS, **CACHES[cache])
    model = compiled(tiny_model(family, **FAMILIES[family]), "inductor")
    assert torch.equal(model.generate(PROMPT, **SETTINGS, **CACHES[cache]), expected)
    assert any(layers(model))


def test_a_prompt_of_another_length_compiles_nothing_anew() -> None:
    model: Any = tiny_model("qwen3_moe", use_cache=False, **FOUR)
    call = compiled(model, "eager")
    with torch.no_grad():
        for length in (16, 5, 11):
            torch._dynamo.mark_dynamic(ids := PROMPT[:, :length].contiguous(), 1)
            call(ids)
    (graph,) = layers(model)
    assert graph


def test_predictions_reach_across_layers_that_are_cut(tmp_path: Path) -> None:
    model: Any = tiny_model("qwen3_moe", use_cache=False, **FOUR)
    with torch.no_grad():
        expected = model(PROMPT).logits
    model.save_pretrained(tmp_path)
    lent = moecc.load(tmp_path, expert_memory="60%", lookahead=1)
    asked = {"inner": "aot_eager", "outline": True, "expert_memory": "60%", "lookahead": 1}
    call = torch.compile(lent, backend="moecc", options=asked)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(call(PROMPT).logits, expected, rtol=1e-4, atol=1e-5)
    (graph,) = layers(lent)
    assert max(graph) >= 2, "layers that predict the same way are alike"

"""generate() takes several roads round torch.compile; all of them run our kernels."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import moecc
from moecc import transformers_experts
from moecc.tiny import tiny_model

OPTIONS = {"inner": "eager"}
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0
}  # fmt: skip
PROMPT = torch.arange(3, 12).unsqueeze(0)


@pytest.fixture
def expected() -> torch.Tensor:
    return tiny_model("qwen3_moe").generate(PROMPT, **SETTINGS)


def test_a_compiled_module_generates_through_its_original(expected: torch.Tensor) -> None:
    model: Any = tiny_model("qwen3_moe")
    compiled: Any = torch.compile(model, backend="moecc", options=OPTIONS)
    assert torch.equal(compiled.generate(PROMPT, **SETTINGS), expected)
    report = moecc.report(compiled)
    assert not report.graphs, "torch 2.13 sends generate() past the compiled module"
    assert report.eager is not None
    assert (report.eager.calls, report.eager.own_calls) == (2 * 8, 0)
    assert "bypassed torch.compile" in str(report)


@pytest.mark.parametrize("road", ["module.compile", "forward"])
def test_a_compiled_forward_generates_in_graphs(road: str, expected: torch.Tensor) -> None:
    model: Any = tiny_model("qwen3_moe")
    if road == "forward":
        model.forward = torch.compile(model.forward, backend="moecc", options=OPTIONS)
    else:
        model.compile(backend="moecc", options=OPTIONS)
    assert torch.equal(model.generate(PROMPT, **SETTINGS), expected)
    report = moecc.report(model)
    assert sum(graph.calls for graph in report.graphs) == 8
    assert {len(graph.blocks) for graph in report.graphs} == {2}


def test_compile_config_compiles_decode_and_prefill_uses_our_kernels_too(
    expected: torch.Tensor,
) -> None:
    model: Any = tiny_model("qwen3_moe")
    config = CompileConfig(backend="moecc", options=OPTIONS, mode=None)
    config._compile_all_devices = True  # transformers compiles on GPUs only, unless told
    got = model.generate(PROMPT, cache_implementation="static", compile_config=config, **SETTINGS)
    assert torch.equal(got, expected)
    report = moecc.report(model)
    assert sum(graph.calls for graph in report.graphs) == 7
    assert report.eager is not None
    assert (report.eager.calls, report.eager.own_calls) == (2, 0)


def test_regional_compilation_serves_all_layers_from_one_graph() -> None:
    model: Any = tiny_model("qwen3_moe")
    expected = model(PROMPT).logits.detach()
    for layer in model.model.layers:
        layer.compile(backend="moecc", options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT, use_cache=False).logits, expected)
    (graph,) = moecc.report(model).graphs
    assert (graph.calls, len(graph.blocks)) == (2, 1)


def test_a_model_that_was_not_compiled_keeps_its_own_experts() -> None:
    torch.compile(tiny_model("qwen3_moe"), backend="moecc", options=OPTIONS)
    other: Any = tiny_model("qwen3_moe")
    other.generate(PROMPT, **SETTINGS)
    assert moecc.report(other).eager is None
    assert "none of its modules was adopted" in moecc.report(other).notes[0]


def test_a_released_model_is_its_old_self() -> None:
    model: Any = tiny_model("qwen3_moe")
    torch.compile(model, backend="moecc", options=OPTIONS)
    transformers_experts.release(model)
    model.generate(PROMPT, **SETTINGS)
    assert moecc.report(model).eager is None


@pytest.mark.parametrize("family", ["gpt_oss", "phimoe"])
def test_the_eager_road_reads_each_activation(family: str) -> None:
    model: Any = tiny_model(family)
    with torch.no_grad():
        expected = model(PROMPT).logits
        torch.compile(model, backend="moecc", options=OPTIONS)
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=1e-4, atol=1e-5)
    eager = moecc.report(model).eager
    assert eager is not None
    assert (eager.calls, eager.own_calls, eager.reasons) == (2, 0, ())


def test_an_activation_that_kernels_lack_keeps_the_models_code_and_a_reason() -> None:
    model: Any = tiny_model("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = torch.nn.Softmax(dim=-1)
    with torch.no_grad():
        expected = model(PROMPT).logits
        compiled = torch.compile(model, backend="moecc", options=OPTIONS)
        assert torch.equal(model(PROMPT).logits, expected)
        torch.testing.assert_close(compiled(PROMPT).logits, expected)
    report = moecc.report(model)
    assert report.eager is not None
    assert (report.eager.calls, report.eager.own_calls) == (0, 2)
    assert "softmax" in str(report.eager.reasons)
    assert all("softmax" in miss["why"] for graph in report.graphs for miss in graph.misses)
    assert not any(graph.blocks for graph in report.graphs)


def test_a_difference_is_a_tie_only_within_rounding() -> None:
    from moecc.generate import find_difference, generate

    model: Any = tiny_model("qwen3_moe")
    once = generate(model, PROMPT, 4)
    assert len(once.tokens) == 4
    changed = replace(once, tokens=(*once.tokens[:2], (once.tokens[2] + 1) % 128, 0))
    found = find_difference(model, PROMPT, once, changed)
    assert found.position == 2
    assert found.gap > 0
    assert not found.is_tie
    assert replace(found, gap=found.rounding).is_tie


def test_comparing_generates_the_same_tokens_and_leaves_the_model_as_it_was() -> None:
    from moecc.generate import compare

    model: Any = tiny_model("qwen3_moe")
    made = compare(model, PROMPT, 4, OPTIONS, rounds=2)
    assert made.difference is None
    assert made.median("moecc", "decode_rate") > 0
    assert "forward" not in model.__dict__
    assert moecc.report(model).eager is None
    assert sum(graph.calls for graph in moecc.report(model).graphs) == 3 * 4


def test_an_experts_implementation_that_somebody_registered_is_theirs() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    def tripled(*args: Any) -> torch.Tensor:
        return 3 * batched_mm_experts_forward(*args)

    ALL_EXPERTS_FUNCTIONS.register("tripled", tripled)
    model: Any = tiny_model("qwen3_moe")
    model.set_experts_implementation("tripled")
    with torch.no_grad():
        expected = model(PROMPT).logits
        compiled = torch.compile(model, backend="moecc", options=OPTIONS)
        torch.testing.assert_close(model(PROMPT).logits, expected)
        torch.testing.assert_close(compiled(PROMPT).logits, expected)


def test_a_model_beside_an_adopted_one_may_be_called_by_its_own_names() -> None:
    torch.compile(tiny_model("qwen3_moe"), backend="moecc", options=OPTIONS)
    other: Any = tiny_model("gpt_oss")
    other.set_experts_implementation("eager")
    experts = other.model.layers[0].mlp.experts
    hidden, ids, weights = torch.randn(3, 64), torch.randint(0, 8, (3, 2)), torch.rand(3, 2)
    with torch.no_grad():
        expected = experts(hidden, ids, weights)
        named = experts(hidden, routing_weights=weights, router_indices=ids)
        assert torch.equal(named, expected)
        torch.compile(other, backend="moecc", options=OPTIONS)
        named = experts(hidden, routing_weights=weights, router_indices=ids)
        torch.testing.assert_close(named, expected)
    assert moecc.report(other).eager.calls == 1


def test_a_tracer_of_an_adopted_model_records_the_models_own_code() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    model: Any = tiny_model("qwen3_moe")
    model.set_experts_implementation("batched_mm")
    torch.compile(model, backend="moecc", options=OPTIONS)
    experts = model.model.layers[0].mlp.experts
    ids, weights = torch.randint(0, 8, (3, 2)), torch.rand(3, 2)
    with torch.no_grad():
        traced = make_fx(lambda hidden: experts(hidden, ids, weights))(torch.randn(3, 64))
        hidden = torch.randn(3, 64)
        torch.testing.assert_close(traced(hidden), experts(hidden, ids, weights))


def test_another_activation_after_adoption_is_the_one_that_runs() -> None:
    model: Any = tiny_model("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    inputs = torch.randn(3, 64), torch.randint(0, 8, (3, 2)), torch.rand(3, 2)
    torch.compile(model, backend="moecc", options=OPTIONS)
    with torch.no_grad():
        experts(*inputs)
        experts.act_fn = torch.nn.ReLU()
        got = experts(*inputs)
        transformers_experts.release(model)
        torch.testing.assert_close(got, experts(*inputs))

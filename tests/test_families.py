"""Every named transformers family compiles to one graph with one experts node a layer."""

import statistics
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import StaticCache

import moecc
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, run
from moecc.records import all_records
from moecc.tiny import tiny_model
from tests.models import relative_error

FAMILIES = {
    "mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 2, "olmoe": 2, "deepseek_v2": 2, "deepseek_v3": 2,
    "phimoe": 2, "gpt_oss": 2,
}  # fmt: skip
"""Model type → MoE layers of its tiny instance."""
TOLERANCE = 1e-5


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 99, shape)


def blocks_of_new_graphs(before: int) -> list[int]:
    return [len(record.blocks) for record in all_records()[before:]]


def check_family(family: str, inner: str, implementation: str | None) -> None:
    """Prefill, decode and other token counts agree with eager, in a handful of graphs."""
    plain, ours = (tiny_model(family) for _ in range(2))
    if implementation is not None:
        for model in (plain, ours):
            model.set_experts_implementation(implementation)
    compiled = torch.compile(ours, backend="moecc", fullgraph=True, options={"inner": inner})
    before = len(all_records())
    with torch.no_grad():
        for shape in ((2, 16), (2, 9), (2, 23), (2, 31), (2, 5)):
            tokens = ids(*shape)
            expected = plain(tokens, use_cache=True)
            got = compiled(tokens, use_cache=True)
            assert relative_error(got.logits, expected.logits) < TOLERANCE
        assert len(all_records()) - before <= 2, "recompiled for each token count"
        for _ in range(4):
            token = ids(2, 1)
            expected = plain(token, past_key_values=expected.past_key_values)
            got = compiled(token, past_key_values=got.past_key_values)
            assert relative_error(got.logits, expected.logits) < TOLERANCE
    found = blocks_of_new_graphs(before)
    assert set(found) == {FAMILIES[family]}
    assert len(found) <= 5, "recompiled for each decode step"
    report = moecc.report(ours)
    assert not any(miss["fallback"] for graph in report.graphs for miss in graph.misses)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_agrees_with_eager(family: str) -> None:
    check_family(family, "eager", None)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "phimoe"])
def test_a_static_cache_is_read_in_place(family: str) -> None:
    """Also by several tokens at once; deepseek_v3's values have another size than its keys."""
    plain, ours = (tiny_model(family) for _ in range(2))
    compiled = torch.compile(ours, backend="moecc", options={"inner": "eager"})
    caches = [StaticCache(config=one.config, max_cache_len=24) for one in (plain, ours)]
    with torch.no_grad():
        for count, call in ((6, ours), (1, compiled), (1, compiled), (3, compiled), (1, compiled)):
            tokens = ids(2, count)
            expected = plain(tokens, past_key_values=caches[0]).logits
            got = call(tokens, past_key_values=caches[1]).logits
            assert relative_error(got, expected) < TOLERANCE
    config: Any = ours.config
    first = moecc.report(ours).graphs[0].attentions
    assert len(first) == config.num_hidden_layers
    assert {one["shared"] for one in first} == {config.num_key_value_heads}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_norm_of_each_experts_output_stays_between_expert_and_sum(implementation: str) -> None:
    plain: Any = tiny_model("muse_spark")
    ours = tiny_model("muse_spark")
    plain.set_experts_implementation(implementation)
    tokens = ids(2, 16)
    compiled = torch.compile(ours, backend="moecc", fullgraph=True, options={"inner": "eager"})
    with torch.no_grad():
        expected = plain(tokens).last_hidden_state
        for road in (compiled, ours):
            got = road(tokens).last_hidden_state
            assert relative_error(got, expected) < TOLERANCE
    report = moecc.report(ours)
    (graph,) = report.graphs
    assert len(graph.blocks) == 2
    assert not graph.misses
    assert report.eager is not None
    assert (report.eager.calls, report.eager.own_calls, report.eager.reasons) == (2, 0, ())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_eager_loop_compiles_to_one_graph_too(family: str) -> None:
    check_family(family, "eager", "eager")


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_a_family_agrees_with_eager_through_inductor(family: str) -> None:
    check_family(family, "inductor", None)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_eager_through_inductor(family: str) -> None:
    check_family(family, "inductor", None)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_structure_alone_finds_the_blocks(
    family: str, implementation: str, dtype: torch.dtype
) -> None:
    """Without the hook, the graph that transformers writes is matched and computes the same."""
    model: Any = tiny_model(family, dtype)
    model.set_experts_implementation(implementation)
    tokens = ids(2, 16)
    results: list[Result] = []

    def passes_only(gm: GraphModule, _: Any) -> GraphModule:
        results.append(run(Program(gm=gm), Options()))
        return gm

    with torch.no_grad():
        expected = model(tokens).logits
        got = torch.compile(model, backend=passes_only, fullgraph=True)(tokens).logits
    (result,) = results
    assert [block.style for block in result.program.blocks] == [implementation] * FAMILIES[family]
    assert not result.misses
    if dtype is torch.float32:
        assert relative_error(got, expected) < TOLERANCE
    else:  # a tie in a router rounds either way and changes that one token
        errors = [relative_error(*pair) for pair in zip(got[0], expected[0], strict=True)]
        assert statistics.median(errors) < 2e-2

"""Routers become one call where a kernel computes all of what they do, and stay where none does."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from moecc.passes.detect_moe import detect_moe
from moecc.passes.fuse_experts import fuse_experts
from moecc.passes.fuse_routers import fuse_routers
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import PIPELINE, Result, run
from moecc.passes.text import graph_diff
from tests.codegen.triton_interpreter import interpreted
from tests.models import Captured, capture, relative_error, tokens
from tests.passes.hand_written import H
from tests.passes.routed import Chosen, Route, Routed
from tests.passes.test_gated_input import TopOne
from tests.passes.test_router import (
    DenseGates,
    balanced,
    capped,
    clamped,
    deepseek_v3,
    gpt_oss,
    groups_apart,
    kept_bias,
    kolibri,
    learned,
    limited,
    mixtral,
    noisy,
    norms,
    other_matrix,
    other_scores,
    scattered,
    small_mlp,
    softmax_of_scattered,
    sorted_scores,
    sqrt_softplus,
    switch,
    unweighted,
    written_over,
)
from tests.passes.test_router_unread import (
    first_weight_halved,
    gathered_elsewhere,
    half_dropped,
    sum_of_another,
    threshold,
    worst_groups,
)

How = Callable[[Route, torch.Tensor], Chosen]


def fuse(captured: Captured, keep_text: bool = False) -> Result:
    """Fuse a graph's experts, and its routers as if they were on a GPU."""
    first = run(Program(gm=captured.gm), Options(kernels="torch"), (detect_moe, fuse_experts))
    blocks = tuple(dataclasses.replace(one, device="cuda") for one in first.program.blocks)
    program = dataclasses.replace(first.program, blocks=blocks)
    return run(program, Options(), (fuse_routers,), keep_text=keep_text)


def check(model: nn.Module, x: torch.Tensor, kernel: str, dtype: torch.dtype) -> None:
    """Compare with the model's own router; `kernel` is the key of the one that takes its place."""
    captured = capture(model, x)
    expected = captured.run()
    (block,) = fuse(captured).program.blocks
    assert block.router_kernel == f"triton: {kernel}"
    names = [str(node.target) for node in captured.gm.graph.nodes]
    assert not {"topk", "softmax", "sigmoid", "scatter_"}.intersection(names)
    with interpreted():
        assert relative_error(captured.run(), expected) < (1e-2 if dtype != torch.float32 else 1e-5)


BOUND = [
    (switch, "softmax, top-1 of 8"),
    (mixtral, "softmax, top-2 of 8, / (sum + 0)"),
    (written_over, "sigmoid, top-2 of 8, / (sum + 1e-06), * 4.0"),
    (gpt_oss, "logits, top-2 of 8, softmax"),
    (kolibri, "logits + bias, top-2 of 8, sigmoid"),
    (
        deepseek_v3,
        "sigmoid + bias, 2 of 4 groups by 2 else -inf, top-2 of 8, / (sum + 1e-20), * 2.5",
    ),
    (groups_apart, "softmax, 2 of 4 groups by 1 else 0, top-2 of 8, * 16.0"),
    (sorted_scores, "softmax, top-2 of 8"),
    (norms, "softmax, top-2 of 8, / (sum + 0)"),
    (clamped, "softmax, top-2 of 8, / (sum + 0, at least 1e-09)"),
    (small_mlp, "softmax, top-2 of 8"),
    (sqrt_softplus, "sqrt-softplus + bias, top-2 of 8"),
]


@pytest.mark.parametrize(("how", "kernel"), BOUND, ids=lambda one: getattr(one, "__name__", ""))
def test_a_router_that_a_kernel_computes_becomes_one_call(how: How, kernel: str) -> None:
    check(Routed(how), tokens(6, torch.float32), f"{kernel} float32 float32", torch.float32)


@pytest.mark.parametrize(
    ("how", "kernel"),
    [
        # The softmax in float32, the weights too; the scores in bfloat16, rounded step by step.
        (mixtral, "softmax, top-2 of 8, / (sum + 0) float32 float32"),
        (gpt_oss, "logits, top-2 of 8, softmax bfloat16 bfloat16"),
        (kolibri, "logits + bias, top-2 of 8, sigmoid bfloat16 bfloat16"),
    ],
)
def test_scores_are_rounded_as_the_model_rounds_them(how: How, kernel: str) -> None:
    check(Routed(how).to(torch.bfloat16), tokens(9), kernel, torch.bfloat16)


@pytest.mark.parametrize(
    ("gates", "kernel"),
    [
        (scattered, "softmax, top-2 of 8 float32 float32"),
        (softmax_of_scattered, "logits, top-2 of 8, softmax float32 float32"),
    ],
)
def test_gates_over_all_experts_become_the_weights_of_the_chosen(
    gates: Callable[[torch.Tensor], torch.Tensor], kernel: str
) -> None:
    check(DenseGates(gates), tokens(6, torch.float32), kernel, torch.float32)


DECLINED = [
    (capped, "soft cap 30"),
    (kept_bias, "its bias stays in the weights"),
    (learned, "learned scale"),
    (other_scores, "not those of the scores that choose"),
    (other_matrix, "not those of the scores that choose"),
    (balanced, "not those of the scores that choose"),
    (noisy, "noise"),
    (limited, "capacity"),
    (unweighted, "not those of the scores that choose"),
    (threshold, ""),
    (worst_groups, "the mask keeps others"),
    (half_dropped, "ids are replaced and their weights are not"),
    (first_weight_halved, "in place"),
    (gathered_elsewhere, ""),
    (sum_of_another, ""),
]


@pytest.mark.parametrize(("how", "why"), DECLINED, ids=lambda one: getattr(one, "__name__", ""))
def test_any_other_router_stays_and_says_why(how: How, why: str) -> None:
    captured = capture(Routed(how), tokens(6, torch.float32))
    result = fuse(captured, keep_text=True)
    (step,) = result.steps
    assert step.before == step.after
    (miss,) = result.misses
    assert miss.why.startswith("its router stays torch's: ")
    assert why in miss.why
    assert not miss.fallback


def test_weights_that_scale_the_tokens_are_made_by_the_kernel_too() -> None:
    x = torch.randn(5, H)
    check(TopOne(), x, "logits, top-1 of 6, sigmoid float32 float32", torch.float32)


def test_shows_what_it_did(golden: Callable[[str], None]) -> None:
    result = fuse(capture(Routed(deepseek_v3), tokens(6, torch.float32)), keep_text=True)
    (step,) = result.steps
    golden(graph_diff(step.before, step.after, "fuse_routers") + "\n")
    (lowering,) = result.program.lowerings
    assert "def choose_experts(" in lowering.source


def test_running_twice_is_running_once() -> None:
    once = fuse(capture(Routed(mixtral), tokens(6, torch.float32)))
    twice = run(once.program, Options(), (fuse_routers,))
    assert twice.steps[0].rewrites == 0
    assert twice.program == once.program


class ReadElsewhere(Routed):
    """Statistics of the choice, and a loss of all scores."""

    def __init__(self, *, of_scores: bool) -> None:
        super().__init__(mixtral)
        self.of_scores = of_scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.pick.proj(x).softmax(-1)
        weights, ids = scores.topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        self.pick.how = lambda r, x: (ids, weights)
        out = super().forward(x)
        return out * (scores if self.of_scores else weights).sum(-1, keepdim=True) + ids.sum()


def test_other_readers_of_ids_and_weights_read_the_kernels() -> None:
    kernel = "softmax, top-2 of 8, / (sum + 0) float32 float32"
    check(ReadElsewhere(of_scores=False), tokens(6, torch.float32), kernel, torch.float32)


def test_scores_that_something_else_reads_keep_the_router() -> None:
    (miss,) = fuse(capture(ReadElsewhere(of_scores=True), tokens(6, torch.float32))).misses
    assert "reads it too" in miss.why


def test_logits_that_are_written_to_later_keep_the_router() -> None:
    def how(r: Route, x: torch.Tensor) -> Chosen:
        logits = r.proj(x)
        weights, ids = logits.softmax(-1).topk(2)
        logits.zero_()
        return ids, weights

    captured = capture(Routed(how), tokens(6, torch.float32))
    expected = captured.run()
    fuse(captured)
    with interpreted():
        assert relative_error(captured.run(), expected) < 1e-5


@pytest.mark.parametrize("options", [Options(kernels="torch"), Options(kernels="native")])
def test_only_triton_computes_routers(options: Options) -> None:
    result = run(Program(gm=capture(Routed(mixtral), tokens(6, torch.float32)).gm), options)
    assert [step.rewrites for step in result.steps if step.name == "fuse_routers"] == [0]
    assert not result.misses


def test_predictions_copy_the_models_own_router() -> None:
    names = [one.__name__ for one in PIPELINE]
    assert names.index("insert_prefetch") < names.index("fuse_routers")

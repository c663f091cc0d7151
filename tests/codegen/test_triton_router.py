"""The kernel of routers: what torch computes, for any number of experts and tokens."""

import dataclasses
import math

import pytest
import torch

from moecc.codegen.router_spec import RouterSpec, choose_torch
from moecc.runtime.errors import InputError

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from moecc.codegen import aot, triton_router
from moecc.codegen.triton_router import plan_router
from tests.codegen.triton_dry_run import dry_run
from tests.codegen.triton_interpreter import interpreted

QWEN3 = RouterSpec(experts=128, active=8, scores="softmax", normalised=True)
DEEPSEEK_V3 = RouterSpec(
    experts=256,
    active=8,
    scores="sigmoid",
    bias=True,
    groups=8,
    kept=4,
    best=2,
    normalised=True,
    epsilon=1e-20,
    scale=2.5,
)
HALF = {"dtype": torch.bfloat16, "weights_dtype": torch.bfloat16}
ROUTERS = {
    "mixtral": dataclasses.replace(QWEN3, experts=8, active=2),
    "qwen3": dataclasses.replace(QWEN3, weights_dtype=torch.bfloat16),
    "deepseek-v2": RouterSpec(
        experts=160, active=6, scores="softmax", groups=8, kept=3, fill=0.0, scale=16.0
    ),
    "deepseek-v3": DEEPSEEK_V3,
    "gpt-oss": RouterSpec(experts=32, active=4, weigh="softmax", **HALF),
    "llama4": RouterSpec(experts=16, active=1, weigh="sigmoid", dtype=torch.bfloat16),
    "ernie": dataclasses.replace(QWEN3, experts=64, active=6, bias=True, floor=1e-12),
    "odd groups": dataclasses.replace(DEEPSEEK_V3, experts=90, groups=6),
    "few": RouterSpec(experts=4, active=4, scores="sigmoid"),
    "odd": RouterSpec(experts=61, active=7, scores="sqrt-softplus", bias=True),
    "many": dataclasses.replace(QWEN3, experts=512, active=10),
}


def make_inputs(spec: RouterSpec, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of which no two of a token's are equal, so that there is one right choice."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.rand(tokens, spec.experts, generator=generator).argsort(-1)
    # Steps of 1/16 around zero are exact in bfloat16, and far apart when biased or squashed.
    logits = ((order - spec.experts / 2) / 32).to(spec.dtype)
    bias = torch.rand(spec.experts, generator=generator) if spec.bias else None
    return logits, bias


def run(spec: RouterSpec, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    with interpreted():
        return triton_router.emit(spec).run(*inputs)


def by_expert(spec: RouterSpec, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weights at their experts' places: an order of k means nothing."""
    return torch.full((len(ids), spec.experts), -1.0).scatter(1, ids, weights.float())


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("name", ROUTERS)
def test_chooses_and_weighs_as_the_definition(name: str, tokens: int) -> None:
    spec = ROUTERS[name]
    inputs = make_inputs(spec, tokens)
    ids, weights = run(spec, *inputs)
    expected_ids, expected = choose_torch(spec, *inputs)
    assert (ids.dtype, weights.dtype) == (torch.int64, spec.weights_dtype)
    tolerance = 1e-2 if spec.weights_dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(
        by_expert(spec, ids, weights),
        by_expert(spec, expected_ids, expected),
        rtol=tolerance,
        atol=0,
    )


def test_of_equal_scores_the_lowest_ids_are_chosen() -> None:
    """torch.topk promises no order among them; both choose scores that are as high."""
    spec = dataclasses.replace(ROUTERS["gpt-oss"], active=5)
    logits = torch.tensor([3, 1, 2, 2, 3, 2, 1, 2]).repeat(4, 4).to(torch.bfloat16)
    logits[1] = -0.0
    logits[1, 20:] = 0.0
    ids, weights = run(spec, logits, None)
    assert ids[0].tolist() == [0, 4, 8, 12, 16]
    assert ids[1].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(logits.gather(1, ids), logits.topk(5).values)
    assert torch.equal(weights, choose_torch(spec, logits, None)[1])


def test_equal_groups_are_kept_in_order() -> None:
    spec = dataclasses.replace(DEEPSEEK_V3, bias=False)
    ids, _ = run(spec, torch.zeros(1, 256), None)
    assert ids.tolist() == [list(range(8))]


def test_not_a_number_is_above_all_and_stays_with_its_token() -> None:
    for spec in (DEEPSEEK_V3, ROUTERS["gpt-oss"], QWEN3):
        logits, bias = make_inputs(spec, 3)
        logits[1, 19] = math.nan
        logits[2] = -math.inf
        logits[2, 3] = math.inf
        ids, weights = run(spec, logits, bias)
        assert weights[1].isnan().any()
        assert weights[0].isfinite().all()
        assert ((ids >= 0) & (ids < spec.experts)).all()
        assert all(len(set(row)) == spec.active for row in ids.tolist())
        if spec is not QWEN3:  # where one makes the whole softmax NaN
            assert 19 in ids[1]
        assert 3 in ids[2]


def test_no_token_is_no_launch_and_another_shape_is_refused() -> None:
    kernel = triton_router.emit(QWEN3)
    ids, weights = kernel.run(torch.zeros(0, 128), None)  # not interpreted: a launch would raise
    assert ids.shape == weights.shape == (0, 8)
    with pytest.raises(InputError, match=r"logits are \[3, 64\]"):
        kernel.run(torch.zeros(3, 64), None)
    with pytest.raises(InputError, match="no bias"):
        kernel.run(torch.zeros(3, 128), torch.zeros(128))


def test_no_token_count_compiles_anew() -> None:
    with dry_run(90) as launches:
        for tokens in (1, 16, 17, 4096):
            triton_router.emit(QWEN3).run(*make_inputs(QWEN3, tokens))
    assert launches.compiled == ["choose_experts"]
    assert [grid for _, grid in launches.launched] == [
        (1, 1, 1),
        (4, 1, 1),
        (5, 1, 1),
        (1024, 1, 1),
    ]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_nothing_spills_with_many_experts(target: str) -> None:
    found = aot.compile_router(ROUTERS["many"], plan_router(ROUTERS["many"]), target)
    assert (found.spilled, found.fits) == (0, True)
    assert found.registers <= 128

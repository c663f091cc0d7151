"""Which plan runs: the least of expressions that say what a layer moves and computes."""

import math

import pytest
import torch

from moecc.codegen.gpus import GPUS, gpu_of
from moecc.codegen.triton_costs import T, choose_plan, expected_experts, expected_tiles, plans
from tests.codegen.triton_cases import make_spec

QWEN3 = make_spec(hidden=2048, intermediate=768, experts=128, dtype=torch.bfloat16)
MIXTRAL = make_spec(hidden=4096, intermediate=14336, experts=8, dtype=torch.bfloat16)
H100 = GPUS["sm_90"]


def binomial(tokens: int, active: int, experts: int) -> list[float]:
    p = active / experts
    return [math.comb(tokens, n) * p**n * (1 - p) ** (tokens - n) for n in range(tokens + 1)]


@pytest.mark.parametrize("tokens", [1, 7, 100, 900])
@pytest.mark.parametrize(("active", "experts"), [(8, 128), (2, 8), (1, 64), (4, 4)])
def test_the_histogram_is_expected_as_it_is(tokens: int, active: int, experts: int) -> None:
    rows = binomial(tokens, active, experts)
    chosen = expected_experts(tokens, active, experts)
    assert chosen == pytest.approx(experts * sum(rows[1:]))
    for block_m in (16, 128):
        tiles = experts * sum(p * math.ceil(n / block_m) for n, p in enumerate(rows))
        assert float(expected_tiles(tokens, active, experts, block_m)) == pytest.approx(
            tiles, rel=0.55 if active == experts else 0.3
        )


@pytest.mark.parametrize("name", GPUS)
def test_a_long_prompt_is_persistent_where_tensors_are_read_by_descriptor(name: str) -> None:
    for spec, active in ((QWEN3, 8), (MIXTRAL, 2)):
        assert not choose_plan(spec, GPUS[name], 64, active).persistent
        for tokens in (4096, 16384):
            plan = choose_plan(spec, GPUS[name], tokens, active)
            assert plan.persistent == GPUS[name].descriptors
            assert not choose_plan(spec, GPUS[name], tokens, active, aligned=False).persistent


def test_a_tile_alone_has_nothing_to_hide_its_reads_behind() -> None:
    one_expert = make_spec(hidden=256, intermediate=256, experts=1, dtype=torch.bfloat16)
    *_, tall, persistent = plans(one_expert, H100, 1)
    assert persistent.seconds(100) > tall.seconds(100)
    assert persistent.seconds(100_000) < tall.seconds(100_000)


@pytest.mark.parametrize("name", GPUS)
def test_a_token_decodes_and_a_prompt_is_grouped_in_tall_tiles(name: str) -> None:
    for spec, active in ((QWEN3, 8), (MIXTRAL, 2)):
        heights = [
            choose_plan(spec, GPUS[name], tokens, active).block_m
            for tokens in (1, 64, 256, 1024, 4096, 16384)
        ]
        assert (heights[0], heights[1], heights[-1]) == (None, 16 if spec is QWEN3 else 32, 128)
        assert heights[1:] == sorted(heights[1:])


def test_experts_that_tokens_share_are_read_once_by_grouped_kernels() -> None:
    decode, short, *_ = plans(MIXTRAL, H100, 8)  # every token takes every expert
    assert decode.seconds(1) < short.seconds(1)
    assert decode.seconds(2) > short.seconds(2)


def test_fewer_bits_cost_less_where_weights_are_the_cost() -> None:
    from moecc.codegen.low_bit import packed_kernel
    from moecc.runtime.schemes.scheme import SCHEMES, Schemes

    costs = [plans(QWEN3, H100, 8)[0].seconds(1)]
    for name in ("int8", "int4"):
        schemes = Schemes(first=SCHEMES[name], second=SCHEMES[name])
        costs.append(plans(packed_kernel(QWEN3, schemes, "torch").spec, H100, 8)[0].seconds(1))
    assert costs == sorted(costs, reverse=True)


def test_the_expression_is_what_is_compared() -> None:
    for plan in plans(QWEN3, H100, 8):
        assert plan.expression.free_symbols == {T}
        assert float(plan.expression.subs(T, 100)) == pytest.approx(plan.seconds(100))


def test_float32_has_no_tiles_that_spill() -> None:
    spec = make_spec(hidden=2048, intermediate=768, experts=128)
    assert choose_plan(spec, H100, 16384, 8).block_m == 64


def test_tensors_that_are_on_no_gpu_stand_for_some_that_are() -> None:
    assert gpu_of(torch.device("cpu")) is H100

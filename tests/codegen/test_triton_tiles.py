"""Which algorithm runs, and how tall its tiles are."""

import pytest
import torch

from moecc.codegen.triton_tiles import choose_block_m, prefers_decode
from tests.codegen.triton_cases import make_spec


@pytest.mark.parametrize(
    ("tokens", "active", "experts", "decode"),
    [
        (1, 8, 8, True),  # one token never shares an expert
        (1, 8, 128, True),
        (4, 8, 128, True),
        (2, 8, 8, False),  # every expert has both tokens
        (16, 4, 128, True),
        (17, 1, 512, False),
        (4096, 8, 128, False),
    ],
)
def test_decode_is_for_few_tokens_that_share_no_experts(
    tokens: int, active: int, experts: int, decode: bool
) -> None:
    assert prefers_decode(make_spec(experts=experts), tokens, active) == decode


@pytest.mark.parametrize(
    ("tokens", "block_m"), [(1, 16), (16, 16), (128, 16), (256, 32), (1024, 64), (1025, 128)]
)
def test_tiles_are_about_twice_the_rows_of_an_expert(tokens: int, block_m: int) -> None:
    half, single = make_spec(experts=128, dtype=torch.float16), make_spec(experts=128)
    assert choose_block_m(half, tokens, active=8) == block_m
    assert choose_block_m(single, tokens, active=8) == min(block_m, 64)

from collections.abc import Callable

import pytest
import torch

from moecc.passes.detect_moe import detect_moe
from moecc.passes.fuse_experts import fuse_experts
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, run
from tests.models import BatchedMoe, Captured, Dense, GroupedMoe, capture, relative_error, tokens
from tests.passes.hand_written import Block, H
from tests.passes.test_gated_input import Llama4
from tests.passes.test_gathered import GptFast

PASSES = (detect_moe, fuse_experts)


def fuse(captured: Captured) -> Result:
    return run(Program(gm=captured.gm), Options(), PASSES, keep_text=True)


@pytest.mark.parametrize("model", [GroupedMoe, BatchedMoe])
def test_makes_one_call_of_a_block(model: type[GroupedMoe], golden: Callable[[str], None]) -> None:
    step = fuse(capture(model(), tokens(6))).steps[-1]
    golden(f"{step.before}→\n{step.after}")


@pytest.mark.parametrize("model", [GptFast, Llama4])
def test_puts_around_the_call_what_the_model_needs(
    model: type[Block], golden: Callable[[str], None]
) -> None:
    step = fuse(capture(model(), torch.randn(6, H))).steps[-1]
    golden(f"{step.before}→\n{step.after}")


@pytest.mark.parametrize("model", [GroupedMoe, BatchedMoe])
def test_keeps_the_numbers(model: type[GroupedMoe]) -> None:
    captured = capture(model(), tokens(6))
    before = captured.run()
    assert fuse(captured).steps[-1].rewrites == 1
    assert relative_error(captured.run(), before) < 1e-2


def test_keeps_the_dtype_of_a_sum_that_the_model_leaves_wide() -> None:
    class WideWeights(BatchedMoe):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model = WideWeights()
    model.pick.register_forward_hook(lambda _, __, out: (out[0], out[1].float()))
    captured = capture(model, tokens(6))
    assert captured.run().dtype is torch.float32
    assert fuse(captured).steps[-1].rewrites == 1
    assert captured.run().dtype is torch.float32


def test_leaves_a_graph_without_blocks_alone() -> None:
    step = fuse(capture(Dense(), tokens(4, torch.float32))).steps[-1]
    assert (step.rewrites, step.before) == (0, step.after)


@pytest.mark.parametrize("model", [GptFast, Llama4])
def test_running_twice_over_what_stands_around_the_call_is_running_once(model: type[Block]) -> None:
    once = fuse(capture(model(), torch.randn(6, H)))
    twice = run(once.program, Options(), PASSES, keep_text=True)
    assert twice.program.blocks == once.program.blocks
    assert twice.steps[-1].after == once.steps[-1].after


def test_running_twice_is_running_once() -> None:
    once = fuse(capture(GroupedMoe(), tokens(6)))
    twice = run(once.program, Options(), PASSES, keep_text=True)
    assert twice.program.blocks == once.program.blocks
    assert twice.steps[-1].after == once.steps[-1].after

"""Shared experts are added by their block's kernel, with the bits of an operator of its own."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from moecc.codegen.triton_launches import plan_launches
from moecc.passes.detect_moe import detect_moe
from moecc.passes.fuse_experts import fuse_experts
from moecc.passes.fuse_shared import fuse_shared
from moecc.passes.ir import Program
from moecc.passes.lower import lower
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, run
from moecc.passes.text import graph_diff
from moecc.runtime.shared import add_shared
from tests.codegen.triton_cases import decode, grouped, make_inputs, make_spec
from tests.codegen.triton_interpreter import interpreted
from tests.models import Captured, capture, tokens
from tests.passes import test_shared as models


def lowered(model: models.Layer, dtype: torch.dtype) -> tuple[Captured, Program]:
    """Capture a layer and give its experts the kernels of a GPU."""
    captured = capture(model.to(dtype), tokens(6, dtype))
    first = run(Program(gm=captured.gm), Options(kernels="torch"), (detect_moe, fuse_experts))
    blocks = tuple(dataclasses.replace(one, device="cuda") for one in first.program.blocks)
    program = dataclasses.replace(first.program, blocks=blocks)
    return captured, run(program, Options(), (lower,)).program


def fuse(program: Program) -> Result:
    return run(program, Options(), (fuse_shared,), keep_text=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [models.Plain, models.InPlace, models.Gated, models.Averaged])
def test_the_sum_is_the_kernels_to_the_bit(model: type[models.Layer], dtype: torch.dtype) -> None:
    captured, program = lowered(model(), dtype)
    with interpreted():
        expected = captured.run()
        assert fuse(program).steps[0].rewrites == 1
        out = captured.run()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "model",
    [models.Alone, models.AfterResidual, models.Scaled, models.OwnNorm, models.OtherInput],
)
def test_anything_else_that_is_added_stays(model: type[models.Layer]) -> None:
    _, program = lowered(model(), torch.float32)
    (step,) = fuse(program).steps
    assert step.rewrites == 0
    assert step.before == step.after


def test_shows_what_it_did_and_does_it_once(golden: Callable[[str], None]) -> None:
    _, program = lowered(models.Gated(), torch.float32)
    once = fuse(program)
    golden(graph_diff(once.steps[0].before, once.steps[0].after, "fuse_shared") + "\n")
    assert fuse(once.program).steps[0].rewrites == 0


@pytest.mark.parametrize("algorithm", [decode, grouped])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_both_algorithms_add_it(algorithm: Callable[..., torch.Tensor], gated: bool) -> None:
    spec = make_spec(dtype=torch.bfloat16)
    x = make_inputs(spec, tokens=3, active=2)
    shared, scale = torch.randn_like(x.hidden), torch.rand(3, 1).bfloat16() if gated else None
    with interpreted():
        alone = algorithm(plan_launches(spec), x)
        both = dataclasses.replace(x, shared=shared, shared_scale=scale)
        assert torch.equal(algorithm(plan_launches(spec), both), add_shared(alone, shared, scale))

from collections.abc import Callable

import pytest
import torch

from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, Step, run
from moecc.passes.text import graph_diff
from moecc.runtime.errors import StrictError
from tests.models import BatchedMoe, Dense, GroupedMoe, capture, relative_error, tokens


def step_of(result: Result) -> Step:
    (step,) = (step for step in result.steps if step.name == "lower")
    return step


def test_names_a_native_kernel_on_a_cpu(golden: Callable[[str], None]) -> None:
    result = run(Program(gm=capture(GroupedMoe(), tokens(6)).gm), Options(), keep_text=True)
    step = step_of(result)
    assert [lowering.kernel[:7] for lowering in result.program.lowerings] == ["native:"]
    golden(graph_diff(step.before, step.after, "lower") + "\n")


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_keeps_the_numbers(kernels: str) -> None:
    captured = capture(BatchedMoe(torch.float32), tokens(6, torch.float32))
    before = captured.run()
    run(Program(gm=captured.gm), Options(kernels=kernels))
    assert relative_error(captured.run(), before) < 1e-5


def test_leaves_a_graph_without_blocks_alone() -> None:
    result = run(Program(gm=capture(Dense(), tokens(4, torch.float32)).gm), Options())
    assert step_of(result).rewrites == 0


def test_running_twice_is_running_once() -> None:
    once = run(Program(gm=capture(GroupedMoe(), tokens(6)).gm), Options(), keep_text=True)
    twice = run(once.program, Options(), keep_text=True)
    assert step_of(twice).after == step_of(once).after
    assert step_of(twice).rewrites == 0


def test_an_emitter_that_declines_leaves_the_torch_kernel_and_a_reason() -> None:
    captured = capture(BatchedMoe(torch.float64), tokens(6, torch.float64))
    before = captured.run()
    result = run(Program(gm=captured.gm), Options(kernels="native"))
    (miss,) = result.misses
    assert "float64" in miss.why
    assert relative_error(captured.run(), before) < 1e-12


def test_strict_refuses_an_emitter_that_declines() -> None:
    captured = capture(BatchedMoe(torch.float64), tokens(6, torch.float64))
    with pytest.raises(StrictError, match="float64"):
        run(Program(gm=captured.gm), Options(kernels="native", strict=True))

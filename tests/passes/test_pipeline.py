import pytest
import torch
from torch import nn

from moecc.passes.ir import Outcome, Program
from moecc.passes.options import Options
from moecc.passes.pipeline import PIPELINE, run
from moecc.runtime.errors import PassError
from tests.models import GroupedMoe, capture, tokens


def test_every_pass_is_documented_by_its_own_module() -> None:
    for one in PIPELINE:
        assert one.__module__ == f"moecc.passes.{one.__name__}"
        page = __import__(one.__module__, fromlist=["_"]).__doc__
        assert all(word in page for word in ("Needs:", "Adds:", "Graph:"))


def test_a_failing_pass_is_named() -> None:
    def break_things(program: Program, options: Options) -> Outcome:
        raise KeyError("lost")

    with pytest.raises(PassError, match="'break_things' failed with KeyError"):
        run(Program(gm=capture(nn.Linear(2, 2), torch.ones(1, 2)).gm), Options(), (break_things,))


def test_a_pass_that_loses_a_block_is_named() -> None:
    def forget(program: Program, options: Options) -> Outcome:
        from dataclasses import replace

        blocks = tuple(replace(block, hidden="gone") for block in program.blocks)
        return Outcome(program=replace(program, blocks=blocks))

    with pytest.raises(PassError, match="'forget' lost nodes \\['gone'\\]"):
        run(Program(gm=capture(GroupedMoe(), tokens(4)).gm), Options(), (*PIPELINE, forget))


class Overwrites(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y[0] = x[0]
        y.add_(1)
        return y


def test_keeps_in_place_writes_that_nobody_reads() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe, self.other = GroupedMoe(), Overwrites()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.moe(x) + self.other(x)

    captured = capture(Both(), tokens(4))
    before = captured.run()
    result = run(Program(gm=captured.gm), Options(kernels="torch"))
    assert len(result.program.blocks) == 1
    torch.testing.assert_close(captured.run(), before, rtol=2e-2, atol=2e-2)

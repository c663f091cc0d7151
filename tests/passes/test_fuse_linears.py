"""Linear layers of one input are computed in one call, with the bits of calls of their own."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

import moecc
from moecc.passes.dense_linears import dense_linears
from moecc.passes.fuse_linears import fuse_linears
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, run
from moecc.passes.text import graph_diff
from tests.models import Captured, capture, relative_error

H, OPTIONS = 48, Options(dense_linears=True)


class Attention(nn.Module):
    """Three projections of one input, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(H, 64), nn.Linear(H, 16)
        self.v, self.o = nn.Linear(H, 16, bias=False), nn.Linear(64, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x)
        return self.o(functional.silu(q) + (self.k(x) * self.v(x)).repeat(1, 4))


class Written(Attention):
    """The input is written to between the projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        q, k = self.q(x), self.k(x)
        x.view(-1).mul_(2)
        return self.o(functional.silu(q) + (k * self.v(x)).repeat(1, 4))


class Heads(nn.Module):
    """More layers than one call takes."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList(nn.Linear(H, 8 + n) for n in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([one(x) for one in self.all], -1)


def handed(model: nn.Module) -> tuple[Captured, Program]:
    captured = capture(model.bfloat16(), torch.randn(6, H, dtype=torch.bfloat16))
    return captured, run(Program(gm=captured.gm), OPTIONS, (dense_linears,)).program


def fuse(program: Program) -> Result:
    return run(program, OPTIONS, (fuse_linears,), keep_text=True)


def same(model: nn.Module, calls: int) -> Result:
    """Fuse a model's layers, hold the result to what it was, and return the record."""
    captured, program = handed(model)
    before = captured.run()
    result = fuse(program)
    assert result.steps[0].rewrites == calls
    assert torch.equal(captured.run(), before)
    return result


def test_layers_of_one_input_are_one_call(golden: Callable[[str], None]) -> None:
    step = same(Attention(), calls=1).steps[0]
    golden(graph_diff(step.before, step.after, "fuse_linears") + "\n")
    assert step.note == "3 of 4 layers in 1 calls"


def test_a_write_comes_between() -> None:
    same(Written(), calls=1)  # q and k, not v


def test_a_call_has_only_so_many_layers() -> None:
    step = same(Heads(), calls=2).steps[0]
    assert step.note == "6 of 6 layers in 2 calls"


def test_running_twice_is_running_once() -> None:
    once = fuse(handed(Attention())[1])
    assert fuse(once.program).steps[0].rewrites == 0


def test_inductor_takes_several_results_and_any_length() -> None:
    model = Attention().bfloat16()
    options = {"dense_linears": True, "strict": True}
    compiled = torch.compile(model, backend="moecc", dynamic=True, options=options)
    with torch.no_grad():
        for count in (5, 9):
            x = torch.randn(count, H, dtype=torch.bfloat16)
            assert relative_error(compiled(x), model(x)) < 2**-7
    (graph,) = moecc.report(model).graphs
    rewrites = {step["name"]: step["rewrites"] for step in graph.passes}
    assert rewrites["fuse_linears"] == 1

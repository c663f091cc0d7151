"""MoE blocks as people write them by hand, each with places to differ, and how to check them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from moecc.passes.ir import MoeBlock, Program
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, run
from tests.models import relative_error

H, WIDTH, E, K = 16, 24, 6, 2
"""Hidden size, intermediate size, experts, active experts."""


class Block(nn.Module):
    """Weights, and a router that gives ids [.., K] and weights [.., K]."""

    active = K
    input_major = False
    merged = False
    bias = False

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        first = (E, H, WIDTH) if self.input_major else (E, WIDTH, H)
        self.w1, self.w3 = (nn.Parameter(torch.randn(first) / 3) for _ in range(2))
        self.w2 = nn.Parameter(
            torch.randn((E, WIDTH, H) if self.input_major else (E, H, WIDTH)) / 3
        )
        both = torch.cat([self.w1, self.w3], 2 if self.input_major else 1)
        self.w13 = nn.Parameter(both.detach())
        self.b1, self.b3 = (nn.Parameter(torch.randn(E, WIDTH)) for _ in range(2))
        self.b2 = nn.Parameter(torch.randn(E, H))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = self.gate(x).softmax(-1).topk(self.active, -1)
        return ids, weights / weights.sum(-1, keepdim=True)


def shapes_of_tokens(dims: int) -> tuple[tuple[int, ...], ...]:
    return ((7,), (4,), (19,)) if dims == 1 else ((2, 7), (3, 4), (2, 19))


def compile_passes(model: nn.Module, results: list[Result], **options: Any) -> Any:
    """Compile with moecc's passes and nothing else, for any number of tokens."""

    def backend(gm: GraphModule, _: Sequence[Any]) -> GraphModule:
        results.append(run(Program(gm=gm), Options(**{"kernels": "torch"} | options)))
        return gm

    return torch.compile(model, backend=backend, fullgraph=True, dynamic=True)


def check_raised(
    model: nn.Module, style: str, dims: int = 1, dtype: torch.dtype = torch.float32, **options: Any
) -> MoeBlock:
    """Hold that the block is found and computes what the model does, in one graph."""
    model = model.to(dtype).eval()
    results: list[Result] = []
    compiled = compile_passes(model, results, **options)
    with torch.no_grad():
        for shape in shapes_of_tokens(dims):
            x = torch.randn(*shape, H, dtype=dtype)
            expected, got = model(x), compiled(x)
            assert got.dtype is expected.dtype
            assert relative_error(got, expected) < (1e-5 if dtype is torch.float32 else 2e-2)
    (result,) = results
    assert not result.misses, result.misses
    (block,) = result.program.blocks
    assert block.style == style
    return block


def check_left_alone(model: nn.Module, dims: int = 1, dtype: torch.dtype = torch.float32) -> str:
    """Hold that nothing is found and nothing changes; give the reason."""
    model = model.to(dtype).eval()
    results: list[Result] = []
    compiled = compile_passes(model, results)
    with torch.no_grad():
        for shape in shapes_of_tokens(dims)[:2]:
            x = torch.randn(*shape, H, dtype=dtype)
            torch.testing.assert_close(compiled(x.clone()), model(x.clone()))
    (result,) = results
    assert not result.program.blocks, result.program.blocks
    return "; ".join(miss.why for miss in result.misses)

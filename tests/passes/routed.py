"""Blocks with a router to be read."""

from collections.abc import Callable

import torch
from torch import nn

from moecc.passes.detect_moe import detect_moe
from moecc.passes.ir import MoeBlock, Program
from moecc.passes.options import Options
from moecc.passes.router.description import Router
from tests.models import HIDDEN, BatchedMoe, capture, tokens

EXPERTS, ACTIVE = 8, 2
Chosen = tuple[torch.Tensor, torch.Tensor]


class Route(nn.Module):
    """Everything that a router may have; `how` says what it does with it."""

    def __init__(self, how: Callable[["Route", torch.Tensor], Chosen]) -> None:
        super().__init__()
        self.how = how
        self.proj = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.other = nn.Linear(HIDDEN, EXPERTS)
        self.squeeze = nn.Linear(HIDDEN, 4)
        self.wide = nn.Linear(4, EXPERTS)
        self.norm = nn.LayerNorm(HIDDEN)
        self.bias = nn.Parameter(torch.randn(EXPERTS))
        self.scale = nn.Parameter(torch.rand(1))
        self.gain = nn.Parameter(torch.rand(EXPERTS))
        self.matrix = nn.Parameter(torch.randn(HIDDEN, EXPERTS))

    def forward(self, x: torch.Tensor) -> Chosen:
        return self.how(self, x)


class Routed(BatchedMoe):
    def __init__(self, how: Callable[[Route, torch.Tensor], Chosen]) -> None:
        super().__init__(torch.float32, active=ACTIVE, experts=EXPERTS)
        self.pick = Route(how)


def described(model: nn.Module, *inputs: torch.Tensor) -> MoeBlock:
    graph = capture(model, *(inputs or (tokens(6, torch.float32),))).gm
    (block,) = detect_moe(Program(gm=graph), Options()).program.blocks
    return block


def router(how: Callable[[Route, torch.Tensor], Chosen]) -> Router:
    found = described(Routed(how)).router
    assert found is not None
    return found

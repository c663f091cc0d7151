"""Compile a model with every pass, and compare it with itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, run
from tests.models import HIDDEN, relative_error

T = 6


@dataclass
class Rewritten:
    """A compiled model, and what became of each of its graphs."""

    model: nn.Module
    results: list[Result]
    call: Callable[[torch.Tensor], Any]

    def error(self, x: torch.Tensor) -> float:
        with torch.no_grad():
            return relative_error(self.call(x), self.model(x))

    @property
    def blocks(self) -> list[int]:
        return [len(result.program.blocks) for result in self.results]


def rewritten(model: nn.Module, **options: Any) -> Rewritten:
    results: list[Result] = []

    def backend(gm: GraphModule, example_inputs: Any) -> GraphModule:
        results.append(run(Program(gm=gm), Options(kernels="torch")))
        return gm

    return Rewritten(model, results, torch.compile(model, backend=backend, **options))


def tokens(count: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))

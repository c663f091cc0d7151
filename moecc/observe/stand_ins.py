"""Put cheap functions in the place of experts while a module is observed.

Each expert becomes a nonlinear function of its own, so that a sum over other experts, other tokens
or other weights than supposed gives other numbers, and no expert's weights are read.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from moecc.observe.recorder import Recorder
from moecc.observe.unrecordable import Unrecordable


def expert_result(number: int, rows: Node) -> Node:
    """Stand in a recording for the result of expert `number` on `rows`."""
    raise NotImplementedError("a recording is not run before its experts are replaced")


class Experts:
    """Functions of rows that a block's result is explained by."""

    def __init__(self, count: int, width: int) -> None:
        self.count, self.width = count, width

    def one(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """Compute expert `number` on rows [.., H]."""
        raise NotImplementedError

    def chosen(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Compute experts ids [T, K] on rows [T, H]; gives [T, K, H], zero for ids outside."""
        terms = rows.new_zeros(*ids.shape, self.width)
        for number in range(self.count):
            tokens, slots = torch.where(ids == number)
            terms[tokens, slots] = self.one(number, rows[tokens])
        return terms

    def weighted(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute a whole block's experts, as our kernels do: sum_k weights * expert(rows)."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        terms = self.chosen(rows, ids).to(wide) * weights.to(wide)[..., None]
        return terms.sum(dim=1).to(rows.dtype)


class StandIns(Experts):
    """What stands for experts that are modules: elementwise, nonlinear, each another function."""

    def __init__(self, count: int, width: int, device: torch.device) -> None:
        super().__init__(count, width)
        generator = torch.Generator().manual_seed(count)
        draw = torch.rand(2, count, width, generator=generator, dtype=torch.float64)
        self._slopes, self._shifts = (draw * 2 + 0.5).float().to(device)

    def one(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """Compute one stand-in."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        inside = rows.to(wide) * self._slopes[number] + self._shifts[number]
        return torch.tanh(inside).to(rows.dtype)


@contextmanager
def replaced(
    experts: Sequence[nn.Module], stand_ins: StandIns, recorder: Recorder | None
) -> Generator[None]:
    """Let stand-ins answer for the experts; with a recorder, note each answer as a node."""
    for number, expert in enumerate(experts):
        expert.__dict__["forward"] = _answer(number, stand_ins, recorder)
    try:
        yield
    finally:
        for expert in experts:
            expert.__dict__.pop("forward", None)


def _answer(
    number: int, stand_ins: StandIns, recorder: Recorder | None
) -> Callable[..., torch.Tensor]:
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) != 1 or kwargs:
            raise Unrecordable("its experts take more than one argument")
        (rows,) = args
        if recorder is None:
            return stand_ins.one(number, rows)
        recorder.paused = True
        result = stand_ins.one(number, rows)
        recorder.paused = False
        known = (number, recorder.node_of(rows))
        recorder.bind(result, recorder.graph.call_function(expert_result, known))
        return result

    return forward

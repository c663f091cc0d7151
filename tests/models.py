"""Tiny MoE blocks and the ways to get their graphs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

HIDDEN, INTERMEDIATE, EXPERTS, ACTIVE = 16, 8, 4, 2


class Router(nn.Module):
    """Softmax, top-k, renormalise."""

    def __init__(self, active: int = ACTIVE, experts: int = EXPERTS) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, experts, bias=False)
        self.active = active

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = self.proj(x).softmax(-1).topk(self.active, -1)
        return ids, weights / weights.sum(-1, keepdim=True)


class GroupedMoe(nn.Module):
    """Sorted tokens and grouped products, written by hand in transformers' `grouped_mm` manner."""

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        active: int = ACTIVE,
        experts: int = EXPERTS,
        act: Callable[[torch.Tensor], torch.Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.pick = Router(active, experts)
        self.up = nn.Parameter(torch.randn(experts, 2 * INTERMEDIATE, HIDDEN) / 4)
        self.low = nn.Parameter(torch.randn(experts, HIDDEN, INTERMEDIATE) / 4)
        self.act = act
        self.to(dtype)

    def product(self, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, weight.transpose(-2, -1), offs=offsets)

    def activate(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return self.act(gate) * up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        tokens, active = ids.shape
        flat = ids.reshape(-1)
        sorted_ids, order = torch.sort(flat)
        experts = self.up.shape[0]
        counts = torch.histc(sorted_ids.float(), bins=experts, min=0, max=experts - 1)
        offsets = counts.cumsum(0, dtype=torch.int32)
        rows = self.product(x[order // active], self.up, offsets)
        terms = self.product(self.activate(rows), self.low, offsets)
        terms = terms * weights.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return terms[inverse].view(tokens, active, x.shape[-1]).sum(dim=1)


class BatchedMoe(GroupedMoe):
    """A gathered copy of the weights for every token, in transformers' `batched_mm` manner."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        tokens, active = ids.shape
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(active, dim=0)
        rows = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1)
        terms = torch.bmm(self.low[flat], self.activate(rows).unsqueeze(-1)).squeeze(-1)
        terms = terms * weights.reshape(-1).unsqueeze(-1)
        return terms.view(tokens, active, x.shape[-1]).sum(dim=1)


class Dense(nn.Module):
    """No MoE at all, though it has a top-k and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, ids = x.topk(ACTIVE, -1)
        return self.proj(x) + values.sum(dim=1, keepdim=True) * ids.sum(dim=1, keepdim=True)


def tokens(count: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(count, HIDDEN, dtype=dtype)


@dataclass(frozen=True)
class Captured:
    """A Dynamo graph and the tensors it was traced with."""

    gm: GraphModule
    inputs: list[Any]

    def run(self) -> torch.Tensor:
        with torch.no_grad():
            return self.gm(*self.inputs)[0]


def capture(model: nn.Module, *inputs: Any) -> Captured:
    """Give the one Dynamo graph of a model, without moecc's hooks."""
    captured: list[Captured] = []

    def keep(gm: GraphModule, example_inputs: Any) -> GraphModule:
        captured.append(Captured(gm, list(example_inputs)))
        return gm

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    (one,) = captured
    return one


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))

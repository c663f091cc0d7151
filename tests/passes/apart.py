"""Experts that are modules, each called on its own buffer, in several spellings."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import EXPERTS, HIDDEN, INTERMEDIATE
from tests.passes.dispatched import Dispatched, TwoChoices

Call = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Mlp(nn.Module):
    """Linear, gelu, linear."""

    def __init__(self, width: int = INTERMEDIATE) -> None:
        super().__init__()
        self.wide = nn.Linear(HIDDEN, width)
        self.narrow = nn.Linear(width, HIDDEN)
        self.dropout = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.dropout(self.act(self.wide(x))))

    def act(self, rows: torch.Tensor) -> torch.Tensor:
        return F.gelu(rows)


class GatedMlp(nn.Module):
    """Gate, up and down of their own, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2))
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Multiplied(Mlp):
    """ST-MoE: GEGLU with a learned multiplicative bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(HIDDEN, 2 * INTERMEDIATE)
        self.mult = nn.Parameter(torch.randn(INTERMEDIATE))

    def act(self, rows: torch.Tensor) -> torch.Tensor:
        x, gate = rows.chunk(2, dim=-1)
        return F.gelu(gate) * x * self.mult


class Swish(Mlp):
    """A learned slope inside of the activation, halves taken by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(HIDDEN, 2 * INTERMEDIATE)
        self.slope = nn.Parameter(torch.randn(INTERMEDIATE))

    def act(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows[..., :INTERMEDIATE], rows[..., INTERMEDIATE:]
        return gate * torch.sigmoid(self.slope * gate) * up.clamp(-2, 2)


class InputMajor(nn.Module):
    """Matrices of its own [inputs, outputs], squared relu."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(HIDDEN, INTERMEDIATE) / 4)
        self.w2 = nn.Parameter(torch.randn(INTERMEDIATE, HIDDEN) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.w1).pow(2) @ self.w2


KINDS = (Mlp, GatedMlp, Multiplied, Swish, InputMajor)


class Apart(Dispatched):
    """Experts from a list, zipped with their buffers and stacked."""

    def __init__(self, kind: type[nn.Module] = Mlp, capacity: int = 2) -> None:
        super().__init__(capacity)
        del self.wi, self.wo
        self.mlps = nn.ModuleList(kind() for _ in range(EXPERTS))
        self.eval()

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([mlp(part) for mlp, part in zip(self.mlps, slots, strict=True)])


class Chunked(Apart):
    """DeepSpeed: chunks of one expert each, concatenated."""

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        parts = slots.chunk(EXPERTS, dim=0)
        return torch.cat([mlp(part) for mlp, part in zip(self.mlps, parts, strict=True)], dim=0)


class Indexed(Apart):
    """Buffers [C, E, H], indexed and selected in the middle."""

    def scatter(self, dispatch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tec,th->ceh", dispatch.to(x.dtype), x)

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([mlp(slots[:, e]) for e, mlp in enumerate(self.mlps)], dim=1)

    def gather(self, combine: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tec,ceh->th", combine, terms)


class Unbound(Apart):
    """Buffers in one row of slots, taken apart by size; results in a tuple."""

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        rows = slots.reshape(-1, HIDDEN).split(self.capacity)
        terms = tuple(mlp(part) for mlp, part in zip(self.mlps, rows, strict=True))
        return torch.cat(terms).view(EXPERTS, self.capacity, HIDDEN)


class Selected(Apart):
    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([mlp(slots.select(0, e)) for e, mlp in enumerate(self.mlps)])


SPELLINGS = (Apart, Chunked, Indexed, Unbound, Selected)


class ApartTwoChoices(TwoChoices, Apart):
    """Two choices a token, experts from a list."""

    experts = Apart.experts

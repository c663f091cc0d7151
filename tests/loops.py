"""Blocks that call their experts from Python, written in the ways that people write them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, INNER, EXPERTS, ACTIVE = 16, 8, 6, 2


class Glu(nn.Module):
    """Gate and up as two layers."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(HIDDEN, INNER, bias=bias)
        self.b = nn.Linear(HIDDEN, INNER, bias=bias)
        self.c = nn.Linear(INNER, HIDDEN, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.silu(self.a(x)) * self.b(x))


class Merged(nn.Module):
    """Gate and up as one layer, a bias only at the end, dropout that does nothing in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.drop = nn.Dropout(0.5)
        self.narrow = nn.Linear(INNER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.wide(x).chunk(2, dim=-1)
        return self.narrow(self.drop(F.gelu(gate, approximate="tanh") * up))


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, INNER), nn.ReLU(), nn.Linear(INNER, HIDDEN))


class Block(nn.Module):
    """Softmax, top-k, renormalise; what follows is the subclass's."""

    top_k = ACTIVE

    def __init__(self, expert: Callable[[], nn.Module] = Glu) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.pool = nn.ModuleList(expert() for _ in range(EXPERTS))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = self.score(x).softmax(-1).topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids


class WhereLoop(Block):
    """Original Mixtral: each expert looks for its tokens and adds to them by index."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = inputs.reshape(-1, inputs.shape[-1])
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.pool):
            token, slot = torch.where(ids == number)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out.view_as(inputs)


class HitLoop(Block):
    """transformers 4.51: one_hot masks, a loop over the experts that were hit, index_add_."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, width = x.shape
        x = x.view(-1, width)
        weights, ids = self.route(x)
        out = torch.zeros((batch * length, width), dtype=x.dtype, device=x.device)
        masks = F.one_hot(ids, num_classes=len(self.pool)).permute(2, 1, 0)
        for hit in torch.greater(masks.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(masks[hit].squeeze(0))
            rows = x[None, token].reshape(-1, width)
            rows = self.pool[hit](rows) * weights[token, slot, None]
            out.index_add_(0, token, rows.to(x.dtype))
        return out.reshape(batch, length, width), weights


class SortedSlices(Block):
    """DeepSeek's moe_infer: argsort, counts in numpy, a slice an expert, a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Glu()

    def infer(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        counts = ids.new_zeros((ids.shape[0], len(self.pool)))
        counts.scatter_(1, ids, 1)
        order = ids.view(-1).argsort()
        rows = x[order // ids.shape[1]]
        parts, start = [], 0
        for number, count in enumerate(counts.sum(dim=0).cpu().numpy()):
            if count == 0:
                continue
            parts.append(self.pool[number](rows[start : start + count]))
            start += count
        done = torch.cat(parts) if parts else rows.new_empty(0)
        back = torch.empty_like(done)
        back[order] = done
        terms = back.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1))
        return terms.sum(dim=1).type(back.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.score(x.view(-1, HIDDEN)).float().sigmoid()
        weights, ids = scores.topk(ACTIVE, dim=-1, sorted=False)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
        out = self.infer(x.view(-1, HIDDEN), ids, weights.to(x.dtype)).view(x.shape)
        return out + self.shared(x)


class IfAnyMask(Block):
    """Tutorials: a boolean mask an expert, skipped when it is empty."""

    def __init__(self) -> None:
        super().__init__(plain_mlp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.score(x)
        best, ids = scores.topk(ACTIVE, dim=-1)
        masked = torch.full_like(scores, float("-inf")).scatter(-1, ids, best)
        gates = masked.softmax(-1).view(-1, EXPERTS)
        flat, out = x.reshape(-1, HIDDEN), torch.zeros_like(x)
        for number, expert in enumerate(self.pool):
            mask = (ids == number).any(dim=-1)
            if mask.view(-1).any():
                rows = expert(flat[mask.view(-1)]) * gates[mask.view(-1), number].unsqueeze(1)
                out[mask] += rows
        return out


class NonzeroGates(Block):
    """The sparse dispatcher of many re-implementations: nonzero gates, split by counts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.score(x)
        best, ids = scores.topk(ACTIVE, dim=1)
        gates = torch.zeros_like(scores).scatter(1, ids, best.softmax(1))
        by_expert, order = torch.nonzero(gates).sort(0)
        token = torch.nonzero(gates)[order[:, 1], 0]
        weight = gates[token].gather(1, by_expert[:, 1:])
        rows = torch.split(x[token], (gates > 0).sum(0).tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.pool, rows, strict=True)])
        return torch.zeros_like(x).index_add(0, token, done * weight)


class TopOneMasks(Block):
    """Every expert on every token, all but one times zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, ids = self.score(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.pool):
            out = out + expert(x) * ((ids == number).to(x.dtype) * best).unsqueeze(-1)
        return out


class StackedOutputs(Block):
    """All experts' results side by side, weighted by scattered gates."""

    def __init__(self) -> None:
        super().__init__(Merged)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        weights, ids = self.route(x)
        gates = torch.zeros_like(self.score(x)).scatter_(-1, ids, weights)
        every = torch.stack([expert(x) for expert in self.pool], dim=-2)
        return {"out": (gates.unsqueeze(-1) * every).sum(-2), "gates": gates, "loss": None}


class WeighedInput(Block):
    """Weights on what goes into the experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.pool):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, expert(x[token] * weights[token, slot, None]))
        return out


class NamedExperts(Block):
    """Switch Transformers: a dictionary of experts, a capacity, the probability on the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.ModuleDict({f"expert_{i}": plain_mlp() for i in range(EXPERTS)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probabilities = self.score(x).softmax(-1)
        mask = F.one_hot(probabilities.argmax(-1), EXPERTS)
        mask = mask * (mask.cumsum(dim=-2) <= 3)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.pool.values()):
            chosen = mask[..., number].bool()
            out[chosen] = expert(x[chosen])
        return out * probabilities.max(-1).values.unsqueeze(-1)


class Apart(nn.Module):
    """Experts that are called with what a router decided, in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.ModuleList(Glu(bias=True) for _ in range(EXPERTS))

    def forward(self, ids: torch.Tensor, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number in ids.unique().tolist():
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, self.pool[number](x[token]) * weights[token, slot, None])
        return out


class RouterApart(nn.Module):
    """A block around `Apart`."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, EXPERTS)
        self.apart = Apart()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, HIDDEN)
        weights, ids = self.score(flat).topk(ACTIVE, dim=-1)
        return self.apart(ids, weights.softmax(-1), flat).view(x.shape)


class StackedSlices(nn.Module):
    """Experts as slices of stacked parameters, ids beyond the last one stand for the token."""

    def __init__(self, copies: int = 2) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, EXPERTS + copies, bias=False)
        self.wide = nn.Parameter(torch.randn(EXPERTS + copies, 2 * INNER, HIDDEN) / 4)
        self.narrow = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.score(x).softmax(-1).topk(ACTIVE, dim=-1)
        out = torch.zeros_like(x)
        for number in range(len(self.wide)):
            token, slot = torch.where(ids == number)
            rows = x[token]
            if number < EXPERTS:
                gate, up = F.linear(rows, self.wide[number]).chunk(2, dim=-1)
                rows = F.linear(F.silu(gate) * up, self.narrow[number])
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out


class PutTogether(nn.Module):
    """Parallel experts: products in a loop, everything between them on all rows at once."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.wide = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 4)
        self.narrow = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 4)

    def product(self, x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
        pieces = x.split(counts, dim=0)
        return torch.cat([F.linear(pieces[i], weight[i]) for i in range(EXPERTS)], dim=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, HIDDEN)
        best, ids = self.score(flat).topk(ACTIVE, dim=1)
        counts = torch.zeros(best.shape[0], EXPERTS).scatter(1, ids, 1).long().sum(0).tolist()
        _, order = ids.flatten().sort(0)
        token = order.div(ACTIVE, rounding_mode="trunc")
        gate, up = self.product(flat[token], self.wide, counts).chunk(2, dim=-1)
        rows = self.product(F.silu(gate) * up, self.narrow, counts)
        rows = rows * best.softmax(1).flatten()[order][:, None]
        return torch.zeros_like(flat).index_add(0, token, rows).view(x.shape)


LOOPS: tuple[Callable[[], nn.Module], ...] = (
    WhereLoop, HitLoop, SortedSlices, IfAnyMask, NonzeroGates, TopOneMasks, StackedOutputs,
    WeighedInput, NamedExperts, RouterApart, StackedSlices,
    PutTogether,
)  # fmt: skip
FLAT = (NonzeroGates, WeighedInput, StackedSlices)
"""Those that take [T, H] only."""


def inputs(kind: Callable[[], nn.Module], *sizes: int) -> torch.Tensor:
    """Make hidden states for a block: [B, S, H], or [B * S, H] where it wants that."""
    x = torch.randn(*sizes, HIDDEN)
    return x.view(-1, HIDDEN) if kind in FLAT else x

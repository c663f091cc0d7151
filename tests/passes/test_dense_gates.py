"""All experts computed for all tokens, and weighted by gates that are zero but for a top-k."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.passes.hand_written import Block, E, H, K, check_left_alone, check_raised


class Dense(Block):
    """The gates by a scatter into zeros; steps that others may write otherwise."""

    input_major = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.combine(self.second(self.act(self.first(x))), self.gates(self.gate(x)))

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1)
        w, ids = p.topk(self.active, -1)
        return torch.zeros_like(p).scatter(-1, ids, w)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bsh,ehf->bsef", x, self.w13)

    def act(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, -1)
        return F.silu(gate) * up

    def second(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bsef,efh->bseh", rows, self.w2)

    def combine(self, y: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return (y * gates.unsqueeze(-1)).sum(2)


class EinsumCombine(Dense):
    def combine(self, y: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bseh,bse->bsh", y, gates)


class MatmulCombine(Dense):
    def combine(self, y: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return (gates.unsqueeze(-2) @ y).squeeze(-2)


class ExpertsFirst(Dense):
    """[E, T, .] by bmm, from tokens that are repeated or broadcast."""

    def first(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, H)
        return torch.bmm(rows.unsqueeze(0).expand(E, -1, -1), self.w13)

    def second(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.w2

    def combine(self, y: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return (y * gates.view(-1, E).t().unsqueeze(-1)).sum(0)


class BroadcastMatmul(Dense):
    def first(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.unsqueeze(-3), self.w13).transpose(1, 2)


class TwoProducts(Dense):
    input_major = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1 = torch.einsum("bsh,efh->bsef", x, self.w1) + self.b1
        x3 = torch.einsum("efh,bsh->bsef", self.w3, x) + self.b3
        y = torch.einsum("bsef,ehf->bseh", F.gelu(x1) * x3, self.w2) + self.b2
        return self.combine(y, self.gates(self.gate(x)))


class GatesOnRows(Dense):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.act(self.first(x)) * self.gates(self.gate(x))[..., None]
        return torch.einsum("bsef,efh->bsh", rows, self.w2)


class ScatteredInPlace(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        w, ids = logits.topk(K, dim=-1)
        gates = torch.full_like(logits, 0.0)
        gates.scatter_(-1, ids, w.softmax(-1))
        return gates


class MaskedSoftmax(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        values, ids = logits.topk(K)
        return torch.full_like(logits, -math.inf).scatter(-1, ids, values).softmax(dim=-1)


class MaskFilled(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        ids = logits.topk(K, -1).indices
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, True)
        return F.softmax(logits.masked_fill(~mask, float("-inf")), dim=-1)


class Where(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        ids = torch.sort(logits, dim=-1, descending=True)[1][..., :K]
        mask = F.one_hot(ids, E).sum(-2) > 0
        p = torch.where(mask, logits.exp(), torch.zeros_like(logits))
        return p / p.sum(-1, keepdim=True)


class OneHotSum(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        w, ids = logits.softmax(-1).topk(K, -1)
        return (F.one_hot(ids, E).to(w.dtype) * w.unsqueeze(-1)).sum(-2)


class OneHotEinsum(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        w, ids = logits.softmax(-1).topk(K, -1)
        return torch.einsum("bsk,bske->bse", w, F.one_hot(ids, E).float())


class MaskTimesProbabilities(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        p = logits.sigmoid()
        kept = p * torch.zeros_like(p).scatter(-1, p.argsort(-1, descending=True)[..., :K], 1.0)
        return 2.5 * (kept / (kept.sum(-1, keepdim=True) + 1e-20))


class AddedMask(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        mask = torch.full_like(logits, -math.inf).scatter(-1, logits.topk(K, -1)[1], 0.0)
        return (logits + mask).softmax(-1)


class TopOne(Dense):
    active = 1

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1)
        return p * F.one_hot(p.argmax(-1), E)


SPELLINGS = (
    Dense, EinsumCombine, MatmulCombine, BroadcastMatmul, TwoProducts, GatesOnRows,
    ScatteredInPlace, MaskedSoftmax, MaskFilled, Where, OneHotSum, OneHotEinsum,
    MaskTimesProbabilities, AddedMask, TopOne,
)  # fmt: skip


@pytest.mark.parametrize("model", SPELLINGS)
def test_a_spelling_is_raised_and_computes_the_same(model: type[Dense]) -> None:
    block = check_raised(model(), "dense_gates", dims=2)
    assert block.active == model.active


class Seen(ExpertsFirst):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(-1, H)).view(x.shape)


@pytest.mark.parametrize("dims", [1, 2])
def test_experts_may_come_before_tokens(dims: int) -> None:
    check_raised((ExpertsFirst if dims == 1 else Seen)(), "dense_gates", dims=dims)


@pytest.mark.parametrize("model", [Dense, MaskedSoftmax])
def test_half_precision_stays_within_its_rounding(model: type[Dense]) -> None:
    check_raised(model(), "dense_gates", dims=2, dtype=torch.bfloat16)


class Threshold(Dense):
    """What ties with the last of the top-k passes as well."""

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1)
        return torch.where(p >= p.topk(K, -1)[0][..., -1:], p, torch.zeros_like(p))


class AllExperts(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)


class SoftmaxOfZeros(Dense):
    """Zeros and not minus infinity: every expert has a gate."""

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        values, ids = logits.topk(K, -1)
        return torch.zeros_like(logits).scatter(-1, ids, values).softmax(-1)


class OtherAxis(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        values, ids = logits.topk(K, -1)
        return torch.full_like(logits, -math.inf).scatter(-1, ids, values).sigmoid().softmax(1)


class TopKOfTokens(Dense):
    """Experts choose tokens: a row may have any number of them."""

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        values, ids = logits.softmax(-1).topk(K, 1)
        return torch.zeros_like(logits).scatter(1, ids, values)


class TwiceTheSame(Dense):
    """Rows of ids that are no top-k may name an expert twice, which a scatter writes once."""

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        w, ids = logits.softmax(-1).topk(K, -1)
        return torch.zeros_like(logits).scatter(-1, ids // 2, w)


class LaterAdded(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        return super().gates(logits) + 0.01


class ChangedAfterwards(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        gates = super().gates(logits)
        gates.add_(0.01)
        return gates


class KeptBase(Dense):
    """Scattered into something that is not the same everywhere."""

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        w, ids = logits.topk(K, -1)
        return (logits * 0.1).scatter(-1, ids, w)


class MaskOfTheChosen(Dense):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(K, -1)[1], True)
        return F.softmax(logits.masked_fill(mask, float("-inf")), dim=-1)


class SummedOverTokens(Dense):
    def combine(self, y: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bseh,bse->beh", y, gates)


class GatesTwice(Dense):
    def combine(self, y: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bseh,bse,bse->bsh", y, gates, gates)


class GatesOfOtherTokens(Dense):
    def combine(self, y: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return super().combine(y, gates.transpose(0, 1).reshape(gates.shape))


class ExpertsReversed(Dense):
    def second(self, rows: torch.Tensor) -> torch.Tensor:
        return super().second(rows.flip(2))


class Averaged(Dense):
    def combine(self, y: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return (y * gates.unsqueeze(-1)).mean(2)


class Attention(Block):
    """Heads are no experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("bsh,ehf->besf", x, w.transpose(1, 2)) for w in (self.w1,) * 3)
        scores = torch.einsum("besf,betf->best", q, k)
        best, ids = scores.topk(2, -1)
        p = torch.full_like(scores, -math.inf).scatter(-1, ids, best).softmax(-1)
        return torch.einsum("best,betf,ehf->bsh", p, v, self.w2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Threshold, "every expert is used"),
        (AllExperts, "every expert is used"),
        (SoftmaxOfZeros, "every expert is used"),
        (OtherAxis, "every expert is used"),
        (TopKOfTokens, "every expert is used"),
        (TwiceTheSame, "twice"),
        (LaterAdded, "every expert is used"),
        (ChangedAfterwards, "every expert is used"),
        (KeptBase, "every expert is used"),
        (MaskOfTheChosen, "every expert is used"),
        (SummedOverTokens, ""),
        (GatesTwice, ""),
        (GatesOfOtherTokens, ""),
        (ExpertsReversed, ""),
        (Averaged, ""),
        (Attention, ""),
    ],
)
def test_a_look_alike_is_left_alone(model: type[Block], reason: str) -> None:
    assert reason in check_left_alone(model(), dims=2)

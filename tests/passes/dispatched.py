"""Ways of dispatching tokens to buffers of limited capacity, and look-alikes that share slots."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import EXPERTS, HIDDEN, INTERMEDIATE

Tensors = tuple[torch.Tensor, torch.Tensor]


class Dispatched(nn.Module):
    """Top-1 (Switch): einsum, gates and drops in one [T, E], bmm over [E, C, H]."""

    choices = 1

    def __init__(self, capacity: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.capacity = capacity
        self.wi = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / 4)
        self.wo = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dispatch, combine = self.route(x, self.router(x).softmax(-1))
        return self.gather(combine, self.experts(self.scatter(dispatch, x)))

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        mask = F.one_hot(probs.argmax(-1), EXPERTS)
        position = self.count(mask)
        mask = mask * (position < self.capacity)
        slot = F.one_hot((position * mask).sum(-1), self.capacity)
        combine = torch.einsum("te,tc->tec", probs * mask, slot.to(probs.dtype))
        return self.filled(combine), combine

    def count(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.cumsum(0) - 1

    def filled(self, combine: torch.Tensor) -> torch.Tensor:
        return combine.bool()

    def scatter(self, dispatch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tec,th->ech", dispatch.to(x.dtype), x)

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.bmm(F.gelu(torch.bmm(slots, self.wi)), self.wo)

    def gather(self, combine: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tec,ech->th", combine, terms)


class TwoChoices(Dispatched):
    """GShard: second choices start behind all first ones, and weights are made to sum to one."""

    choices = 2

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        mask1 = F.one_hot(probs.argmax(-1), EXPERTS)
        rest = probs.masked_fill(mask1.bool(), float("-inf"))
        mask2 = F.one_hot(rest.argmax(-1), EXPERTS)
        position1 = torch.cumsum(mask1, dim=0) - 1
        position2 = self.second(mask1, mask2)
        mask1 *= torch.lt(position1, self.capacity)
        mask2 *= torch.lt(position2, self.capacity)
        weight1, weight2 = (
            torch.einsum("te,te->t", probs, mask.type_as(probs)) for mask in (mask1, mask2)
        )
        total = torch.clamp(weight1 + weight2, min=1e-9)
        weight1 /= total
        weight2 /= total
        combine = self.one(weight1, mask1, position1) + self.one(weight2, mask2, position2)
        return combine.bool(), combine

    def second(self, mask1: torch.Tensor, mask2: torch.Tensor) -> torch.Tensor:
        position = torch.cumsum(mask2, dim=0) - 1
        position += torch.sum(mask1, dim=0, keepdim=True)
        return position

    def one(self, weight: torch.Tensor, mask: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        gates = weight.unsqueeze(-1) * mask
        slot = F.one_hot((position * mask).sum(1), num_classes=self.capacity)
        return gates.unsqueeze(2) * slot.unsqueeze(1)


class KeptChoices(Dispatched):
    """Mesh TensorFlow: exclusive counts of floats; second choices start behind the kept first."""

    choices = 2

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        gate1, index1 = probs.max(-1)
        mask1 = F.one_hot(index1, EXPERTS).float()
        gate2, index2 = (probs * (1.0 - mask1)).max(-1)
        mask2 = F.one_hot(index2, EXPERTS).float()
        position1 = (mask1.cumsum(-2) - mask1) * mask1
        mask1 = mask1 * (position1 < float(self.capacity)).float()
        count1 = mask1.sum(dim=-2, keepdim=True)
        position2 = self.after(mask2.cumsum(-2) - mask2, count1) * mask2
        mask2 = mask2 * (position2 < float(self.capacity)).float()
        combine = self.one(gate1, mask1, index1, position1)
        combine = combine + self.one(gate2, mask2, index2, position2)
        return (combine > 0).to(x.dtype), combine

    def after(self, position: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return position + count

    def one(
        self, gate: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        kept = mask.sum(-1)
        slot = F.one_hot((position.sum(-1) * kept).long(), self.capacity)
        flat = (gate * kept)[..., None, None] * F.one_hot(index, EXPERTS)[..., None]
        return flat * slot[..., None, :]


class Stacked(Dispatched):
    """nanoMoE: choices stacked as [K, T, E], one count over all, products flattened, biases."""

    choices = 2

    def __init__(self, capacity: int = 2) -> None:
        super().__init__(capacity)
        self.bi = nn.Parameter(torch.randn(EXPERTS, 1, INTERMEDIATE) / 4)
        self.bo = nn.Parameter(torch.randn(EXPERTS, 1, HIDDEN) / 4)

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        mask = F.one_hot(probs.topk(self.choices, -1)[1], EXPERTS).permute(1, 0, 2)
        position = self.stacked(mask)
        mask *= torch.lt(position, self.capacity)
        slot = F.one_hot(torch.sum(mask * position, dim=-1), num_classes=self.capacity)
        weights = mask * probs[None]
        combine = torch.sum(weights.unsqueeze(3) * slot.unsqueeze(2), dim=0)
        return combine.bool(), combine

    def stacked(self, mask: torch.Tensor) -> torch.Tensor:
        count = torch.cumsum(mask.reshape(-1, EXPERTS), dim=0) - 1
        return count.reshape(self.choices, -1, EXPERTS)

    def scatter(self, dispatch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return dispatch.permute(1, 2, 0).type_as(x) @ x

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        hidden = torch.bmm(slots, self.wi)
        hidden += self.bi
        terms = torch.bmm(F.relu(hidden), self.wo)
        terms += self.bo
        return F.dropout(terms, 0.1, training=False)

    def gather(self, combine: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        return combine.view(combine.shape[0], -1) @ terms.view(-1, HIDDEN)


class TokenMajor(Dispatched):
    """Earlier tokens go first with all of their choices; positions gathered, slots compared."""

    choices = 2

    def __init__(self, capacity: int = 2) -> None:
        super().__init__(capacity)
        self.bi = nn.Parameter(torch.randn(EXPERTS, 1, INTERMEDIATE) / 4)
        self.bo = nn.Parameter(torch.randn(EXPERTS, HIDDEN) / 4)

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        weights, ids = probs.topk(2, -1)
        mask = F.one_hot(ids, EXPERTS)
        count = (mask.view(-1, EXPERTS).cumsum(0) - 1).view(-1, 2, EXPERTS)
        position = count.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        slot = position.unsqueeze(-1) == torch.arange(self.capacity)
        dispatch = torch.einsum("tke,tkc->tec", mask.to(x.dtype), slot.to(x.dtype))
        combine = torch.einsum("tk,tke,tkc->tec", weights, mask.to(x.dtype), slot.to(x.dtype))
        return dispatch, combine

    def scatter(self, dispatch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (dispatch.reshape(x.shape[0], -1).t() @ x).view(EXPERTS, self.capacity, HIDDEN)

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        hidden = torch.baddbmm(self.bi, slots, self.wi)
        return torch.einsum("xyz,xzw->xyw", F.silu(hidden), self.wo) + self.bo.unsqueeze(1)

    def gather(self, combine: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        return torch.mm(combine.flatten(1), terms.flatten(0, 1))


class SpareColumn(Dispatched):
    """What does not fit lands in a column that is cut off."""

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        weight, ids = probs.max(-1)
        mask = F.one_hot(ids, EXPERTS)
        position = (self.count(mask) * mask).sum(-1)
        slot = F.one_hot(self.bounded(position), self.capacity + 1)[..., : self.capacity]
        dispatch = (mask.unsqueeze(-1) * slot.unsqueeze(1)).to(x.dtype)
        return dispatch, weight[:, None, None] * dispatch

    def bounded(self, position: torch.Tensor) -> torch.Tensor:
        return position.clamp(max=self.capacity)


class FilledColumn(SpareColumn):
    """The same with `where`."""

    def bounded(self, position: torch.Tensor) -> torch.Tensor:
        return torch.where(position < self.capacity, position, self.capacity)


class ClampedSlots(Dispatched):
    """Positions are clamped into the buffer, and what was dropped has no weight."""

    choices = 2

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        weights, ids = probs.topk(2, -1)
        mask = F.one_hot(ids, EXPERTS).permute(1, 0, 2)
        count = mask.reshape(-1, EXPERTS).cumsum(0).view(2, -1, EXPERTS)
        position = (count * mask).sum(-1) - 1
        weights = self.dropped(weights.t(), position)
        slot = F.one_hot(position.clamp(min=0, max=self.capacity - 1), self.capacity)
        combine = torch.einsum("kt,kte,ktc->tec", weights, mask.float(), slot.float())
        return combine != 0, combine

    def dropped(self, weights: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return weights.masked_fill(position >= self.capacity, 0)


class ChoiceMajor(Dispatched):
    """First choices of all tokens, then second ones, in one dimension."""

    choices = 2

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        weights, ids = probs.topk(2)
        chosen = F.one_hot(ids.T.reshape(-1), EXPERTS)
        place = (self.count(chosen) * chosen).sum(-1)
        kept = chosen * (place.unsqueeze(-1) < self.capacity)
        slots = kept.unsqueeze(-1) * (place[:, None, None] == torch.arange(self.capacity))
        slots = slots.view(2, len(x), EXPERTS, self.capacity)
        return slots.sum(0), (slots * weights.T[:, :, None, None]).sum(0)


class MultiHot(Dispatched):
    """One mask of all choices, a position with every expert, and dense gates."""

    choices = 2

    def __init__(self, capacity: int = 2) -> None:
        super().__init__(capacity)
        self.wi = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) / 4)
        self.wg = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) / 4)

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        mask = F.one_hot(self.pick(probs), EXPERTS).sum(1)
        position = mask.cumsum(0) - mask
        kept = mask * (position < self.capacity)
        slot = F.one_hot(position * kept, self.capacity) * kept.unsqueeze(-1)
        return slot.to(x.dtype), slot * (probs * kept).unsqueeze(-1)

    def pick(self, probs: torch.Tensor) -> torch.Tensor:
        return probs.topk(2, -1)[1]

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        gate = slots @ self.wg.transpose(1, 2)
        up = torch.einsum("ech,eih->eci", slots, self.wi)
        return (F.silu(gate) * up) @ self.wo


class Groups(Dispatched):
    """Every sequence has buffers of its own: [B, N, H] in, [B, N, E, C] to dispatch with."""

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        mask = F.one_hot(probs.argmax(-1), EXPERTS)
        position = mask.cumsum(1) - 1
        mask = mask * (position < self.capacity)
        slot = F.one_hot((position * mask).sum(-1), self.capacity).to(x.dtype)
        dispatch = torch.einsum("bne,bnc->bnec", mask.to(x.dtype), slot).bool()
        return dispatch, probs.unsqueeze(-1) * dispatch

    def scatter(self, dispatch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnd,bnec->ebcd", x, dispatch.to(x.dtype))

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        rows = slots.reshape(EXPERTS, -1, HIDDEN)
        terms = torch.einsum("...nd,...dh->...nh", rows, self.wi)
        terms = torch.einsum("...nh,...hd->...nd", F.relu(terms), self.wo)
        return terms.reshape(slots.shape)

    def gather(self, combine: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ebcd,bnec->bnd", terms, combine)


SPELLINGS = (
    Dispatched, TwoChoices, KeptChoices, Stacked, TokenMajor, SpareColumn, FilledColumn,
    ClampedSlots, MultiHot, ChoiceMajor,
)  # fmt: skip


class Proportional(TokenMajor):
    """A capacity that is a share of the tokens, rounded up."""

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        self.capacity = math.ceil(1.25 * self.choices * x.shape[0] / EXPERTS)
        return super().route(x, probs)


@dataclass(frozen=True)
class Knobs:
    """What `Mixed` is put together of: some right, some wrong, most combinations senseless."""

    start: Literal["all first", "kept first", "second", "nothing"]
    count: Literal["one less", "exclusive", "inclusive"]
    kept: Literal["below", "at most", "all"]
    bend: Literal["none", "buffer", "spare", "last"]
    slot: Literal["one hot", "spare column", "compare"]
    mask: Literal["kept", "chosen"]
    dispatch: Literal["nonzero", "positive", "masks"]
    in_place: bool
    capacity: Literal[1, 2, 3]


class Mixed(Dispatched):
    """Two choices in one of many ways."""

    def __init__(self, knobs: Knobs) -> None:
        super().__init__(knobs.capacity)
        self.knobs = knobs

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        weights, ids = probs.topk(2, -1)
        mask1, mask2 = (F.one_hot(chosen, EXPERTS) for chosen in ids.unbind(-1))
        position1, position2 = self.positions(mask1), self.positions(mask2)
        kept1 = self.keep(mask1.clone(), position1)
        before = {"all first": mask1, "kept first": kept1, "second": mask2, "nothing": mask1 * 0}
        position2 = position2 + before[self.knobs.start].sum(0, keepdim=True)
        kept2 = self.keep(mask2.clone(), position2)
        one = self.place(mask1, kept1, position1, weights[:, 0])
        two = self.place(mask2, kept2, position2, weights[:, 1])
        combine = one[1] + two[1]
        filled = {"nonzero": combine != 0, "positive": combine > 0, "masks": one[0] + two[0]}
        return filled[self.knobs.dispatch], combine

    def positions(self, mask: torch.Tensor) -> torch.Tensor:
        count = mask.cumsum(0)
        less = {"one less": 1, "exclusive": mask, "inclusive": 0}[self.knobs.count]
        return count - less

    def keep(self, mask: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        most = {"below": self.capacity - 1, "at most": self.capacity, "all": 10**6}
        fits = position <= most[self.knobs.kept]
        if not self.knobs.in_place:
            return mask * fits
        mask *= fits
        return mask

    def place(
        self, mask: torch.Tensor, kept: torch.Tensor, position: torch.Tensor, weight: torch.Tensor
    ) -> Tensors:
        used = kept if self.knobs.mask == "kept" else mask
        position = (position * kept).sum(-1)
        if self.knobs.bend == "buffer":
            position = position.clamp(0, self.capacity - 1)
        elif self.knobs.bend == "spare":
            position = torch.where(kept.sum(-1) > 0, position, self.capacity)
        elif self.knobs.bend == "last":
            position = torch.where(kept.sum(-1) > 0, position, self.capacity - 1)
        if self.knobs.slot == "compare":
            slot = position.unsqueeze(-1) == torch.arange(self.capacity)
        else:
            spare = int(self.knobs.slot == "spare column")
            slot = F.one_hot(position, self.capacity + spare)[..., : self.capacity]
        dispatch = used.unsqueeze(-1) * slot.unsqueeze(1)
        return dispatch, weight[:, None, None] * dispatch

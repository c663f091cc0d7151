"""Slots that two tokens may share, and blocks that only look like capacity dispatch: left alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import run
from tests.models import EXPERTS, HIDDEN, capture
from tests.passes.dispatched import Dispatched, MultiHot, Stacked, Tensors, TwoChoices
from tests.passes.rewriting import T, rewritten, tokens


class NoCount(Dispatched):
    """Positions that say nothing of who was there before."""

    def count(self, mask: torch.Tensor) -> torch.Tensor:
        return torch.arange(mask.shape[0]).remainder(2).unsqueeze(-1).expand(-1, EXPERTS)


class CountOfExperts(Dispatched):
    """The count runs over experts, not over tokens."""

    def count(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.cumsum(1) - 1


class CountOfOthers(Dispatched):
    """The count is that of another expert's tokens."""

    def count(self, mask: torch.Tensor) -> torch.Tensor:
        other = F.one_hot((mask.argmax(-1) + 1) % EXPERTS, EXPERTS)
        return (other.cumsum(0) - 1).clamp(min=0)


class NarrowCount(Dispatched):
    """The count stops at 256, where bfloat16 has no next number."""

    def count(self, mask: torch.Tensor) -> torch.Tensor:
        return (mask.bfloat16().cumsum(0) - 1).long()


class CountOfProbabilities(Dispatched):
    """What is counted are no ones."""

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        mask = F.one_hot(probs.argmax(-1), EXPERTS)
        position = ((probs * mask).cumsum(0).long() * mask).sum(-1).clamp(max=self.capacity - 1)
        combine = (probs * mask).unsqueeze(-1) * F.one_hot(position, self.capacity).unsqueeze(1)
        return combine.bool(), combine


class MostCertainFirst(Dispatched):
    """Batch-prioritised: tokens are counted in the order of their probability."""

    def count(self, mask: torch.Tensor) -> torch.Tensor:
        order = self.certainty.argsort(descending=True)
        return (mask[order].cumsum(0) - 1)[order.argsort()]

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        self.certainty = probs.amax(-1)
        return super().route(x, probs)


class NotDropped(Dispatched):
    """What does not fit shares the last slot."""

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        mask = F.one_hot(probs.argmax(-1), EXPERTS)
        position = (self.count(mask) * mask).sum(-1).clamp(max=self.capacity - 1)
        combine = (probs * mask).unsqueeze(-1) * F.one_hot(position, self.capacity).unsqueeze(1)
        return combine.bool(), combine


class DroppedButNotTheWeight(Dispatched):
    """What is dropped has position 0 and keeps its weight."""

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        mask = F.one_hot(probs.argmax(-1), EXPERTS)
        position = self.count(mask)
        kept = mask * (position < self.capacity)
        slot = F.one_hot((position * kept).sum(-1), self.capacity)
        combine = (probs * mask).unsqueeze(-1) * slot.unsqueeze(1)
        return combine.bool(), combine


class Scaled(Dispatched):
    """Tokens enter with their weight."""

    def filled(self, combine: torch.Tensor) -> torch.Tensor:
        return combine


class Shifted(Dispatched):
    """What comes back is the next token's."""

    def filled(self, combine: torch.Tensor) -> torch.Tensor:
        return combine.roll(1, 0).bool()


class OnlyPositive(Dispatched):
    """A weight below zero has no slot, and brings back what an empty one gives."""

    def filled(self, combine: torch.Tensor) -> torch.Tensor:
        return combine > 0

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        return super().route(x, probs - 0.5)


class CombineWrittenTo(Dispatched):
    """What comes back was changed after slots were filled."""

    def filled(self, combine: torch.Tensor) -> torch.Tensor:
        dispatch = combine.bool()
        combine.add_(0.1)
        return dispatch


class DispatchWrittenTo(Dispatched):
    """Slots are filled with more than the tokens that come back."""

    def scatter(self, dispatch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        dispatch = dispatch.to(x.dtype)
        dispatch.add_(1)
        return super().scatter(dispatch, x)


class TokensWrittenTo(Dispatched):
    """Tokens are overwritten before their experts' output is there."""

    def scatter(self, dispatch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        slots = super().scatter(dispatch, x)
        x.add_(1)
        return slots

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clone())


class SlotWrittenTo(Dispatched):
    """A slot is emptied before the experts see it."""

    def scatter(self, dispatch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        slots = super().scatter(dispatch, x)
        slots[0, 0] = 0
        return slots


class NormedSlots(Dispatched):
    """Experts see more than one slot at a time."""

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        return super().experts(slots / slots.norm(dim=1, keepdim=True).clamp(min=1))


class SecondFromZero(TwoChoices):
    """Second choices start where the first ones do."""

    def second(self, mask1: torch.Tensor, mask2: torch.Tensor) -> torch.Tensor:
        return mask2.cumsum(0) - 1


class SecondBehindItself(TwoChoices):
    """Second choices start behind as many as they are themselves."""

    def second(self, mask1: torch.Tensor, mask2: torch.Tensor) -> torch.Tensor:
        return mask2.cumsum(0) - 1 + mask2.sum(0, keepdim=True)


class SecondBehindSome(TwoChoices):
    """Second choices start behind the first tokens' first ones."""

    def second(self, mask1: torch.Tensor, mask2: torch.Tensor) -> torch.Tensor:
        return mask2.cumsum(0) - 1 + mask1[:3].sum(0, keepdim=True)


class SecondBehindExperts(TwoChoices):
    """Second choices start behind the number of a token's own experts."""

    def second(self, mask1: torch.Tensor, mask2: torch.Tensor) -> torch.Tensor:
        return mask2.cumsum(0) - 1 + mask1.sum(1, keepdim=True)


class EachChoiceAlone(Stacked):
    """First and second choices are counted apart, into the same buffers."""

    def stacked(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.cumsum(1) - 1


class OtherOrder(Stacked):
    """Positions are counted by choice and read by token."""

    def stacked(self, mask: torch.Tensor) -> torch.Tensor:
        count = mask.reshape(-1, EXPERTS).cumsum(0)
        return count.reshape(-1, self.choices, EXPERTS).permute(1, 0, 2)


class SecondBehindNobody(TwoChoices):
    """Second choices start behind what a factor takes away again."""

    def second(self, mask1: torch.Tensor, mask2: torch.Tensor) -> torch.Tensor:
        count = mask1.sum(0, keepdim=True)
        return mask2.cumsum(0) - 1 + torch.add(count, count, alpha=-1)


class EnteredTwice(MultiHot):
    """Tokens enter as often as they have likely choices."""

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        values, ids = probs.topk(2, -1)
        chosen = F.one_hot(ids, EXPERTS)
        mask = chosen.sum(1)
        position = mask.cumsum(0) - mask
        kept = mask * (position < self.capacity)
        slot = F.one_hot(position * kept, self.capacity) * kept.unsqueeze(-1)
        once = torch.einsum("tke,tec->tec", chosen.float(), slot.float())
        dispatch = once * (values > 0.1).float().sum(-1)[:, None, None]
        return dispatch, dispatch * probs.unsqueeze(-1)


class TwiceTheSame(MultiHot):
    """Nothing keeps a token from choosing an expert twice, and then it is there twice."""

    def pick(self, probs: torch.Tensor) -> torch.Tensor:
        return torch.stack([probs.argmax(-1), probs.argmax(-1)], -1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (NoCount, "not a count"),
        (CountOfExperts, "does not count all tokens"),
        (CountOfOthers, "not counted"),
        (NarrowCount, "cannot hold large counts"),
        (CountOfProbabilities, "not a mask of zeros and ones"),
        (MostCertainFirst, "not a count"),
        (NotDropped, "several tokens the same position"),
        (DroppedButNotTheWeight, "was dropped, gets a slot"),
        (Scaled, "tokens are scaled"),
        (Shifted, "does not give each token one position"),
        (OnlyPositive, "below zero"),
        (CombineWrittenTo, "written to in place"),
        (DispatchWrittenTo, "written to in place"),
        (TokensWrittenTo, "in place in the middle"),
        (SecondFromZero, "do not start where"),
        (SecondBehindItself, "do not start where"),
        (SecondBehindSome, "do not start where"),
        (SecondBehindExperts, "differs between tokens"),
        (EachChoiceAlone, "does not count all tokens and choices"),
        (OtherOrder, "not a mask of zeros and ones"),
        (SecondBehindNobody, "do not start where"),
        (EnteredTwice, "choose the same expert twice"),
        (TwiceTheSame, "adds positions up over more"),
    ],
)
def test_slots_that_may_be_shared_are_left_alone_with_a_reason(
    model: type[Dispatched], reason: str
) -> None:
    compiled = rewritten(model())
    assert compiled.error(tokens()) == 0
    (result,) = compiled.results
    assert result.program.blocks == ()
    assert any(reason in miss.why and miss.fallback for miss in result.misses), result.misses


def test_axes_of_the_same_size_are_told_apart() -> None:
    mixed_up = rewritten(OtherOrder(EXPERTS))
    assert mixed_up.error(tokens(OtherOrder.choices)) == 0
    assert mixed_up.blocks == [0]
    assert "not counted" in mixed_up.results[0].misses[0].why
    right = rewritten(Stacked(EXPERTS))
    assert max(right.error(tokens(count)) for count in (Stacked.choices, EXPERTS)) < 1e-5
    assert set(right.blocks) == {1}


@pytest.mark.parametrize("model", [NormedSlots, SlotWrittenTo])
def test_experts_that_are_no_experts_are_left_alone(model: type[Dispatched]) -> None:
    compiled = rewritten(model())
    assert compiled.error(tokens()) == 0
    assert compiled.blocks == [0]


def test_slots_that_somebody_else_reads_are_left_alone() -> None:
    class SlotsReturned(Dispatched):
        def forward(self, x: torch.Tensor) -> Any:
            dispatch, combine = self.route(x, self.router(x).softmax(-1))
            slots = self.scatter(dispatch, x)
            return self.gather(combine, self.experts(slots)), slots

    result = run(Program(gm=capture(SlotsReturned(), tokens()).gm), Options())
    assert result.program.blocks == ()
    assert any("is used by" in miss.why for miss in result.misses)


class SoftMoe(Dispatched):
    """Every slot is a mixture of all tokens: no expert is left out, and nothing is to be gained."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(HIDDEN, EXPERTS, self.capacity))

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        scores = torch.einsum("th,hec->tec", x, self.slots)
        return scores.softmax(0), scores.flatten(1).softmax(-1).view_as(scores)


class ExpertChoice(Dispatched):
    """Experts choose tokens, and may choose the same one."""

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        weights, ids = probs.topk(self.capacity, 0)
        dispatch = F.one_hot(ids, x.shape[0]).permute(2, 1, 0).to(x.dtype)
        return dispatch, dispatch * weights.t()


class Modules(Dispatched):
    """Experts that are modules of their own, each called on its buffer (DeepSpeed)."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        parts = zip(self.mlps, slots.chunk(EXPERTS, 0), strict=True)
        return torch.cat([mlp(part) for mlp, part in parts], 0)


def test_experts_called_one_by_one_are_told() -> None:
    compiled = rewritten(Modules())
    assert compiled.error(tokens()) == 0
    assert compiled.blocks == [0]
    assert any("called one by one" in miss.why for miss in compiled.results[0].misses)


def test_a_soft_mixture_is_no_failure_even_of_a_strict_run() -> None:
    compiled = rewritten(SoftMoe())
    assert compiled.error(tokens()) == 0
    assert compiled.blocks == [0]
    assert not any(miss.fallback for miss in compiled.results[0].misses)


def test_experts_that_choose_their_tokens_are_left_alone() -> None:
    compiled = rewritten(ExpertChoice())
    assert compiled.error(tokens()) == 0
    assert compiled.blocks == [0]


def test_a_combine_tensor_of_another_graph_is_left_alone_and_says_so() -> None:
    class Behind(Dispatched):
        def forward(self, x: torch.Tensor, combine: torch.Tensor) -> torch.Tensor:
            return self.gather(combine, self.experts(self.scatter(combine.bool(), x)))

    combine = torch.rand(T, EXPERTS, 2)
    result = run(Program(gm=capture(Behind(), tokens(), combine).gm), Options())
    assert result.program.blocks == ()
    assert "made before this graph begins" in result.misses[0].why

"""Gates that hold the masks of all choices in one tensor, and write it choice by choice."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tests.models import EXPERTS
from tests.passes.dispatched import Groups, Tensors
from tests.passes.scattered_gates import columns


class StackedRows(Groups):
    """[K, B, N, E]: choices after the first are drawn, each starts behind what the others kept."""

    choices = 2

    def room(self, count: int) -> int:
        return max(min(count, int(count * 2.0 / EXPERTS)), 4)

    def weights(self, values: torch.Tensor) -> torch.Tensor:
        return values / values.sum(0, keepdim=True).clamp(min=1e-9)

    def drawn(self, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        stays = torch.zeros_like(weights).uniform_(0.0, 1.0) < weights / 0.4
        stays[0, ...] = True
        mask *= stays.float().unsqueeze(-1)
        return mask

    def count(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (0, 0, 1, -1)).cumsum(dim=-2)

    def drop(self, mask: torch.Tensor, index: int, fits: torch.Tensor) -> None:
        mask[index] *= fits

    def next(self, kept: torch.Tensor, before: torch.Tensor | float) -> torch.Tensor | float:
        return kept.sum(-2, keepdim=True) + before

    def stack(self, positions: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(positions))

    def counted(self, mask: torch.Tensor, weights: torch.Tensor) -> Tensors:
        mask = self.drawn(mask, weights)
        return mask, self.count(mask)

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        return F.one_hot(ids, EXPERTS).float()

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        room = self.room(x.shape[1])
        values, ids = probs.topk(self.choices, -1)
        values, ids = values.permute(2, 0, 1), ids.permute(2, 0, 1)
        weights = self.weights(values)
        mask, count = self.counted(self.mask(ids), weights)
        positions: list[torch.Tensor] = []
        before: torch.Tensor | float = 0.0
        for index in range(self.choices):
            position = (count[index] + before) * mask[index]
            self.drop(mask, index, (position < float(room)).float())
            before = self.next(mask[index], before)
            positions.append(position.sum(-1))
        kept = self.finished(mask).sum(-1)
        weights = weights * kept
        slot = columns(self.stack(positions), room)[..., None, :]
        chosen = F.one_hot(ids, EXPERTS)[..., None]
        combine = (weights[..., None, None] * kept[..., None, None] * chosen * slot).sum(0)
        return self.through(combine.bool().type(x.dtype), combine), combine

    def finished(self, mask: torch.Tensor) -> torch.Tensor:
        return mask

    def through(self, dispatch: torch.Tensor, combine: torch.Tensor) -> torch.Tensor:
        return dispatch


class ThreeRows(StackedRows):
    """Three choices."""

    choices = 3


class StraightThrough(StackedRows):
    """Gradients pass the dispatch tensor as if it were the combine tensor."""

    def through(self, dispatch: torch.Tensor, combine: torch.Tensor) -> torch.Tensor:
        return dispatch + combine - combine.detach()


class InPlaceRows(StackedRows):
    """A row is taken out and multiplied, and never put back."""

    def drop(self, mask: torch.Tensor, index: int, fits: torch.Tensor) -> None:
        row = mask[index]
        row.mul_(fits)


class OtherRow(StackedRows):
    """What does not fit is taken from the other choice, which has none of it; no slot is left."""

    def drop(self, mask: torch.Tensor, index: int, fits: torch.Tensor) -> None:
        mask[1 - index] *= fits


class AllFromZero(StackedRows):
    """Every choice starts in the first slot."""

    def next(self, kept: torch.Tensor, before: torch.Tensor | float) -> torch.Tensor | float:
        return before


class BehindTheLast(ThreeRows):
    """Third choices start behind the second ones, wherever those started."""

    def next(self, kept: torch.Tensor, before: torch.Tensor | float) -> torch.Tensor | float:
        return kept.sum(-2, keepdim=True)


class OneTooEarly(StackedRows):
    """Second choices start in the slot of the last first one."""

    def next(self, kept: torch.Tensor, before: torch.Tensor | float) -> torch.Tensor | float:
        return kept.sum(-2, keepdim=True) - 1


class DrawnLate(StackedRows):
    """Choices are counted before some are taken away, and the others start behind who stayed."""

    def counted(self, mask: torch.Tensor, weights: torch.Tensor) -> Tensors:
        count = self.count(mask)
        stays = torch.zeros_like(weights).uniform_(0.0, 1.0) < weights / 0.8
        mask *= stays.float().unsqueeze(-1)
        return mask, count


class BehindSome(StackedRows):
    """Second choices start behind some of the first ones."""

    def next(self, kept: torch.Tensor, before: torch.Tensor | float) -> torch.Tensor | float:
        some = torch.zeros_like(kept).uniform_(0.0, 1.0) < 0.5
        return (kept * some.float()).sum(-2, keepdim=True) + before


class RowFilled(StackedRows):
    """Second choices that were taken away come back."""

    def finished(self, mask: torch.Tensor) -> torch.Tensor:
        mask[1] = 1
        return mask


class AllWritten(StackedRows):
    """Something is written to all rows at once."""

    def finished(self, mask: torch.Tensor) -> torch.Tensor:
        mask.transpose(0, 1).fill_(1)
        return mask


class PartWritten(StackedRows):
    """Something is written to a part of a row."""

    def finished(self, mask: torch.Tensor) -> torch.Tensor:
        mask[1, 0] = 1
        return mask


class OneMemory(StackedRows):
    """Both rows are one in memory: who drops a first choice drops the second one too."""

    def counted(self, mask: torch.Tensor, weights: torch.Tensor) -> Tensors:
        mask = mask[0].clone().expand(2, -1, -1, -1)
        return mask, self.count(mask)


class OtherOrder(StackedRows):
    """Each choice gets the position of the other one."""

    def stack(self, positions: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(positions)[::-1])


class CountOfChoices(StackedRows):
    """The count runs over a token's choices."""

    def count(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (0, 0, 0, 0, 0, 0, 1, -1)).cumsum(dim=0)


class LargeWeights(StraightThrough):
    """Weights are no shares: where they are large, ones are lost beside them."""

    def weights(self, values: torch.Tensor) -> torch.Tensor:
        return values.exp() * 1e8


class SharesOfOthers(StraightThrough):
    """Weights are divided by the sum over the tokens, not over the choices."""

    def weights(self, values: torch.Tensor) -> torch.Tensor:
        return values / values.sum(1, keepdim=True).clamp(min=1e-9, max=1e-3)


class TakesAnother(StraightThrough):
    """What is taken away is not what was added."""

    def through(self, dispatch: torch.Tensor, combine: torch.Tensor) -> torch.Tensor:
        return dispatch + combine - combine.detach() * 2


class RoundedThrough(StraightThrough):
    """What is added and taken away is rounded to less than the experts are."""

    def through(self, dispatch: torch.Tensor, combine: torch.Tensor) -> torch.Tensor:
        narrow = combine.bfloat16()
        return dispatch.bfloat16() + narrow - narrow.detach()

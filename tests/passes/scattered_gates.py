"""Gates of two choices that pad their masks to count, and write masks and weights in place."""

import torch
import torch.nn.functional as F

from tests.models import EXPERTS
from tests.passes.dispatched import Groups, Tensors


def columns(position: torch.Tensor, count: int) -> torch.Tensor:
    """One column is one, and none for a position that has no slot."""
    where = torch.arange(count, device=position.device)
    return (position.long().unsqueeze(-1) == where).to(torch.int64)


class PaddedCounts(Groups):
    """Positions are counts of padded masks without the last one; some second choices are drawn."""

    choices = 2

    def room(self, count: int) -> int:
        return max(min(count, int(count * 2.0 / EXPERTS)), 4)

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (0, 0, 1, 0)).cumsum(-2)[..., :-1, :]

    def start(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first.sum(-2, keepdim=True)

    def drawn(self, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        draw = torch.zeros_like(weight).uniform_(0.0, 1.0)
        mask *= (draw < weight / 0.4).float().unsqueeze(-1)
        return mask

    def dropped(self, mask: torch.Tensor, position: torch.Tensor, room: int) -> torch.Tensor:
        mask *= (position < float(room)).float()
        return mask

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        room = self.room(x.shape[1])
        weight1, ids1 = (one.squeeze(-1) for one in probs.topk(1, -1))
        mask1 = F.one_hot(ids1, EXPERTS).float()
        weight2, ids2 = (one.squeeze(-1) for one in (probs * (1.0 - mask1)).topk(1, -1))
        mask2 = F.one_hot(ids2, EXPERTS).float()
        total = weight1 + weight2 + 1e-9
        weight1 /= total
        weight2 /= total
        mask2 = self.drawn(mask2, weight2)

        position1 = self.first(mask1) * mask1
        mask1 = self.dropped(mask1, position1, room)
        position2 = self.before(mask2) + self.start(mask1, mask2)
        position2 *= mask2
        mask2 = self.dropped(mask2, position2, room)
        one = self.one(weight1, mask1, ids1, columns(position1.sum(-1), room))
        two = self.one(weight2, mask2, ids2, columns(position2.sum(-1), room))
        combine = one + two
        return combine.bool().to(combine), combine

    def first(self, mask: torch.Tensor) -> torch.Tensor:
        return self.before(mask)

    def one(
        self, weight: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor
    ) -> torch.Tensor:
        kept = mask.sum(-1)
        weight *= kept
        chosen = F.one_hot(ids, EXPERTS)[..., None]
        return weight[..., None, None] * kept[..., None, None] * chosen * slot[..., None, :]


class CutBehind(PaddedCounts):
    """The pad takes the last token away itself."""

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (0, 0, 1, -1)).cumsum(dim=-2)


class AllSecond(PaddedCounts):
    """No draw: every second choice is kept."""

    def drawn(self, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return mask


class NoSecond(PaddedCounts):
    """Second choices are switched off."""

    choices = 1

    def drawn(self, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(mask)


class PadBehind(PaddedCounts):
    """Everybody has the count of the token behind."""

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (0, 0, 0, 1)).cumsum(-2)[..., 1:, :]


class PadByTwo(PaddedCounts):
    """A token does not count the one right before it."""

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (0, 0, 2, -2)).cumsum(-2)


class PadOfExperts(PaddedCounts):
    """A token counts those of the expert before its own."""

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (1, -1)).cumsum(-2)


class CountOfExperts(PaddedCounts):
    """The count runs over experts, not over tokens."""

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (1, 0)).cumsum(-1)[..., :-1]


class CountOfGroups(PaddedCounts):
    """The count runs over sequences, and those have buffers of their own."""

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (0, 0, 0, 0, 1, 0)).cumsum(0)[:-1]


class PadOfHalves(PaddedCounts):
    """The pad is no zero."""

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (0, 0, 1, 0), value=0.5).cumsum(-2)[..., :-1, :]


class TwoLeftOut(PaddedCounts):
    """A token gets the count of another one: the pad is two, and so is what is cut off."""

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        return F.pad(mask, (0, 0, 2, 0)).cumsum(-2)[..., :-2, :]


class CountWrittenTo(PaddedCounts):
    """Counts become all the same before they are read."""

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        count = F.pad(mask, (0, 0, 1, 0)).cumsum(-2)
        count.mul_(0)
        return count[..., :-1, :]


class PadWrittenTo(PaddedCounts):
    """What was padded is emptied before it is counted."""

    def before(self, mask: torch.Tensor) -> torch.Tensor:
        padded = F.pad(mask, (0, 0, 1, -1))
        padded.mul_(0)
        return padded.cumsum(-2)


class MaskWrittenAfter(PaddedCounts):
    """Tokens that were not counted get a slot: the mask is filled once it was counted."""

    def dropped(self, mask: torch.Tensor, position: torch.Tensor, room: int) -> torch.Tensor:
        mask.fill_(1)
        return mask


class FirstFromOne(PaddedCounts):
    """First choices start one later, so that the last of them meets the first second choice."""

    def first(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.cumsum(-2)


class SecondFromZero(PaddedCounts):
    """Second choices start where the first ones do."""

    def start(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(first.sum(-2, keepdim=True))


class SecondBehindItself(PaddedCounts):
    """Second choices start behind as many as they are themselves."""

    def start(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return second.sum(-2, keepdim=True)


class DrawnNumbers(PaddedCounts):
    """Second choices are scaled with a draw, and counted by it."""

    def drawn(self, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mask *= torch.zeros_like(weight).uniform_(0.0, 1.0).unsqueeze(-1)
        return mask


class SwitchedOffTooLate(NoSecond):
    """Second choices are not counted, and all weigh as much as ever in the first slot."""

    def one(
        self, weight: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor
    ) -> torch.Tensor:
        chosen = F.one_hot(ids, EXPERTS)[..., None]
        return weight[..., None, None] * chosen * slot[..., None, :]

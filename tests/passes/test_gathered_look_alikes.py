"""What nearly gathers matrices for every choice of a token is left alone, or raised and equal."""

import pytest
import torch
import torch.nn.functional as F

from tests.passes.hand_written import (
    WIDTH,
    Block,
    E,
    H,
    K,
    check_left_alone,
    check_raised,
)
from tests.passes.test_gathered import Biased, GptFast, WeighedTokens


class SummedOverTokens(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tai,ta->ai", y, weights)


class SummedOverFeatures(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (y * weights.unsqueeze(-1)).sum(-1)


class WeightsSummedApart(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tai,tb->ti", y, weights)


class WeightsSquared(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tai,ta,ta->ti", y, weights, weights)


class WeighedBeforeAndAfter(WeighedTokens):
    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().second(x, ids) * self.route(self.seen)[1].unsqueeze(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return super().forward(x)


class NotWeighed(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return y.sum(1)


class SummedCopies(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        terms = (y * weights.unsqueeze(-1)).unsqueeze(1)
        return terms.expand(-1, 3, -1, -1).sum((1, 2))


class TermsUsedElsewhere(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().combine(y, weights) + y.amax(1)


class RowsUsedElsewhere(GptFast):
    def act(self, x1: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        self.seen = x1.view(-1, WIDTH)
        return super().act(x1, x3)

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().combine(y, weights) + self.seen.mean()


class OtherExpertsBelow(GptFast):
    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().second(x, ids.flip(-1))


class NextExpertBelow(GptFast):
    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().second(x, (ids + 1) % E)


class MoreExpertsThanMatrices(GptFast):
    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.cat([self.gate(x), torch.full_like(x[..., :3], -1e9)], -1).softmax(-1)
        weights, ids = scores.topk(K, -1)
        return ids, weights


class GateOfAnotherToken(GptFast):
    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().first(x.flip(0), ids)[0], super().first(x, ids)[1]


class GateOfAnotherChoice(GptFast):
    def act(self, x1: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        return F.silu(x1.flip(1)) * x3


class Normalised(GptFast):
    def act(self, x1: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        return F.normalize(x1, dim=-1) * x3


class BroadcastGate(GptFast):
    def act(self, x1: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        return F.silu(x1[:, :1]) * x3


class OneHalfTwice(GptFast):
    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w1, _ = self.w13[ids].chunk(2, dim=2)
        other, _ = self.w13[ids].chunk(2, dim=2)
        return torch.einsum("ti,taoi->tao", x, w1), torch.einsum("ti,taoi->tao", x, other)


class UnweighedBias(GptFast):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.b2[self.route(x)[0]].sum(1)


class BiasOfOtherExperts(Biased):
    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return GptFast.second(self, x, ids) + self.b2[ids.flip(-1)]


class BiasOfOneProduct(Biased):
    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return GptFast.second(self, x, ids)


class RoundedInTheMiddle(GptFast):
    def act(self, x1: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        return super().act(x1, x3).bfloat16().float()


class RoundedMatrices(GptFast):
    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tao,taio->tai", x, self.w2[ids].bfloat16().float())


class WeightsChangedAfterwards(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        terms = y * weights.unsqueeze(-1)
        weights.mul_(2)
        return terms.sum(1) + weights.sum()


class WeightsChangedBefore(GptFast):
    """The write comes between the block's products, and before anything reads the weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.route(x)
        rows = self.act(*self.first(x, ids))
        weights.mul_(2)
        out = self.combine(self.second(rows, ids), weights)
        return out + weights.sum()


class RowsChangedInTheMiddle(GptFast):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        ids, weights = self.route(x)
        x1, x3 = self.first(x, ids)
        x.add_(1)
        return self.combine(self.second(self.act(x1, x3), ids), weights) + x


class InPlaceForAllToSee(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen = y.view(-1, H)
        y *= weights.unsqueeze(-1)
        return y.sum(dim=1) + seen.mean()


class MixedAcrossTokens(GptFast):
    """The second product mixes choices of all tokens."""

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tai,sa->si", y, weights)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (SummedOverTokens, ""),
        (SummedOverFeatures, ""),
        (WeightsSummedApart, ""),
        (WeightsSquared, ""),
        (NotWeighed, "weighted tokens"),
        (SummedCopies, "copies"),
        (TermsUsedElsewhere, "is used by"),
        (RowsUsedElsewhere, "is used by"),
        (OtherExpertsBelow, "same experts"),
        (NextExpertBelow, "same experts"),
        (MoreExpertsThanMatrices, "chosen among 9 experts"),
        (GateOfAnotherToken, "different rows"),
        (GateOfAnotherChoice, "same experts"),
        (Normalised, "no product"),
        (BroadcastGate, "activation"),
        (OneHalfTwice, "halves"),
        (BiasOfOtherExperts, ""),
        (BiasOfOneProduct, "only one of the two products has a bias"),
        (RoundedInTheMiddle, "rounded to torch.bfloat16"),
        (RoundedMatrices, ""),
        (WeightsChangedAfterwards, "in place in the middle"),
        (RowsChangedInTheMiddle, "in place in the middle"),
        (InPlaceForAllToSee, ""),
        (MixedAcrossTokens, ""),
    ],
)
def test_a_look_alike_is_left_alone(model: type[Block], reason: str) -> None:
    assert reason in check_left_alone(model())


@pytest.mark.parametrize("model", [UnweighedBias, WeighedBeforeAndAfter, WeightsChangedBefore])
def test_what_is_done_outside_of_the_block_stays_outside(model: type[Block]) -> None:
    check_raised(model(), "gathered")

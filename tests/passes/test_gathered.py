"""Matrices gathered for every choice of a token: all spellings of one sum."""

import pytest
import torch
import torch.nn.functional as F

from moecc.passes.pipeline import Result
from tests.models import relative_error
from tests.passes.hand_written import (
    WIDTH,
    Block,
    E,
    H,
    K,
    check_raised,
    compile_passes,
)


class GptFast(Block):
    """As gpt-fast writes it, in steps that others may write otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.route(x)
        return self.combine(self.second(self.act(*self.first(x, ids)), ids), weights)

    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w1, w3 = self.w1[ids], self.w3[ids]
        return torch.einsum("ti,taoi -> tao", x, w1), torch.einsum("ti, taoi -> tao", x, w3)

    def act(self, x1: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        return F.silu(x1) * x3

    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tao, taio -> tai", x, self.w2[ids])

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tai,ta -> ti", y, weights)


class OtherLetters(GptFast):
    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.einsum("nkfh,nh->knf", self.w1[ids], x).transpose(0, 1),
            torch.einsum("ZyxH,ZH->Zyx", self.w3[ids], x),
        )

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bc,bcd->bd", weights, y)


class MulAndSum(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (weights.unsqueeze(-1) * y).sum(1)


class KeptThenSqueezed(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (y * weights[:, :, None]).sum(dim=-2, keepdim=True).squeeze(1)


class MatmulCombine(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (weights.unsqueeze(1) @ y).squeeze(1)


class BmmCombine(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights.reshape(-1, 1, K), y).reshape(-1, H)


class Matmuls(GptFast):
    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        column = x[:, None, :, None]
        return (self.w1[ids] @ column).squeeze(-1), torch.matmul(self.w3[ids], column).squeeze(-1)

    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (x.unsqueeze(-2) @ self.w2[ids].transpose(-1, -2)).squeeze(-2)


class Flattened(GptFast):
    """One row a choice, by bmm."""

    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, flat = x.repeat_interleave(K, dim=0).unsqueeze(1), ids.reshape(-1)
        first = (torch.bmm(rows, one[flat].mT).view(-1, K, WIDTH) for one in (self.w1, self.w3))
        return tuple(first)  # pyright: ignore[reportReturnType]

    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.flatten()
        return torch.bmm(self.w2[flat], x.reshape(-1, WIDTH, 1)).view(-1, K, H)


class ExpandedAndIndexSelected(GptFast):
    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.unsqueeze(1).expand(-1, K, -1).reshape(-1, 1, H)
        w1 = self.w1.index_select(0, ids.view(-1)).transpose(1, 2)
        w3 = torch.index_select(self.w3, 0, ids.view(-1)).permute(0, 2, 1)
        return torch.bmm(rows, w1).view(-1, K, WIDTH), torch.bmm(rows, w3).view(-1, K, WIDTH)


class MergedRows(GptFast):
    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x1, x3 = torch.einsum("ti,taoi->tao", x, self.w13[ids]).chunk(2, dim=-1)
        return x1, x3


class MergedMatrices(GptFast):
    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w1, w3 = self.w13[ids].chunk(2, dim=2)
        return torch.einsum("ti,taoi->tao", x, w1), torch.einsum("ti,taoi->tao", x, w3)


class MergedBeforeTheGather(GptFast):
    """And the halves the other way round."""

    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w3, w1 = self.w13.split(WIDTH, dim=1)
        return torch.einsum("ti,taoi->tao", x, w1[ids]), torch.einsum("ti,taoi->tao", x, w3[ids])


class Ungated(GptFast):
    def act(self, x1: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        return F.relu(x1) ** 2


class UpFirst(GptFast):
    def act(self, x1: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        return x3.clamp(-1, 1) * F.gelu(x1, approximate="tanh")


class InputMajor(GptFast):
    input_major = True

    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x1, x3 = torch.einsum("ti,taio->tao", x, self.w13[ids]).chunk(2, dim=-1)
        return x1, x3

    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tao, taoi -> tai", x, self.w2[ids])


class Biased(GptFast):
    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x1, x3 = super().first(x, ids)
        return x1 + self.b1[ids], self.b3[ids] + x3

    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().second(x, ids) + self.b2[ids]


class WeighedRows(GptFast):
    """Weights with the activated rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.route(x)
        rows = self.act(*self.first(x, ids)) * weights.unsqueeze(-1)
        return torch.einsum("tao,taio->ti", rows, self.w2[ids])


class WeighedTokens(GptFast):
    """Weights with the tokens: not the same for an activation that is not linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.route(x)
        rows = x[:, None] * weights[..., None]
        x1 = torch.einsum("tai,taoi->tao", rows, self.w1[ids])
        x3 = torch.einsum("tai,taoi->tao", rows, self.w3[ids])
        return self.second(self.act(x1, x3), ids).sum(1)


class ThreeOperands(GptFast):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.route(x)
        return torch.einsum("tao,taio,ta->ti", self.act(*self.first(x, ids)), self.w2[ids], weights)


class InPlace(GptFast):
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y *= weights.unsqueeze(-1)
        return y.sum(dim=1)


class AfterANorm(GptFast):
    """The token itself is a product, with a weight of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.b2[0] * F.normalize(x, dim=-1))


class ScaledWeights(GptFast):
    """The routing weights are a product as well."""

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().combine(y, weights * self.b2.sum())


class TopOne(GptFast):
    active = 1


class TopOneWithoutADimension(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).max(-1)
        rows = F.silu(torch.einsum("th,tfh->tf", x, self.w1[ids]))
        rows = rows * torch.einsum("th,tfh->tf", x, self.w3[ids])
        return torch.einsum("tf,thf->th", rows, self.w2[ids]) * weights[:, None]


class ManyDimensions(GptFast):
    """[B, S, H] all the way."""

    def first(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w1, w3 = self.w1[ids], self.w3[ids]
        return torch.einsum("bsi,bsaoi->bsao", x, w1), torch.einsum("...i,...aoi->...ao", x, w3)

    def second(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bsao,bsaio->bsai", x, self.w2[ids])

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bsai,bsa->bsi", y, weights)


class ViewedThere(GptFast):
    """[B, S, H] seen as [T, H] for the block alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(-1, H)).view(x.shape)


SPELLINGS = (
    GptFast, OtherLetters, MulAndSum, KeptThenSqueezed, MatmulCombine, BmmCombine, Matmuls,
    Flattened, ExpandedAndIndexSelected, MergedRows, MergedMatrices, MergedBeforeTheGather, Ungated,
    UpFirst, InputMajor, Biased, WeighedRows, WeighedTokens, ThreeOperands, InPlace, AfterANorm,
    ScaledWeights, TopOne, TopOneWithoutADimension,
)  # fmt: skip


@pytest.mark.parametrize("model", SPELLINGS)
def test_a_spelling_is_raised_and_computes_the_same(model: type[Block]) -> None:
    block = check_raised(model(), "gathered")
    assert (block.hidden_size, block.intermediate, block.experts) == (H, WIDTH, E)
    assert block.active == (1 if "TopOne" in model.__name__ else K)


@pytest.mark.parametrize("model", [ManyDimensions, ViewedThere])
def test_tokens_may_have_several_dimensions(model: type[Block]) -> None:
    check_raised(model(), "gathered", dims=2)


@pytest.mark.parametrize("model", [GptFast, Flattened, MergedMatrices, Biased, WeighedTokens])
def test_half_precision_stays_within_its_rounding(model: type[Block]) -> None:
    check_raised(model(), "gathered", dtype=torch.bfloat16)


@pytest.mark.parametrize("model", [GptFast, MergedRows, InputMajor, WeighedTokens])
def test_the_native_kernels_agree(model: type[Block]) -> None:
    check_raised(model(), "gathered", kernels="auto")


class ThreeInputs(GptFast):
    """Experts alone, as a graph that begins after the router sees them."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return self.combine(self.second(self.act(*self.first(x, ids)), ids), weights)


def test_negative_ids_count_from_the_last_expert() -> None:
    model, results = ThreeInputs(), list[Result]()
    x, weights = torch.randn(5, H), torch.rand(5, K)
    ids = torch.randint(-E, E, (5, K))
    torch._dynamo.mark_static(ids, 1)
    torch._dynamo.mark_static(weights, 1)
    with torch.no_grad():
        got = compile_passes(model, results)(x, ids, weights)
        assert relative_error(got, model(x, ids, weights)) < 1e-5
    (block,) = results[0].program.blocks
    assert block.ids.startswith("remainder")


@pytest.mark.parametrize("tokens", [1, K, E, H, WIDTH])
def test_sizes_that_happen_to_be_equal_mean_nothing(tokens: int) -> None:
    model, results, x = GptFast(), list[Result](), torch.randn(tokens, H)
    with torch.no_grad():
        torch._dynamo.mark_static(x)
        got = compile_passes(model, results)(x)
        assert relative_error(got, model(x)) < 1e-5
    assert len(results[0].program.blocks) == 1


def test_what_autocast_rounds_is_left_alone() -> None:
    model, results, x = GptFast(), list[Result](), torch.randn(5, H)
    compiled = compile_passes(model, results)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x))
    assert "rounded to torch.bfloat16" in results[0].misses[0].why

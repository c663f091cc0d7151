"""Rows sorted by expert and multiplied group by group, brought back in several ways."""

import pytest
import torch
import torch.nn.functional as F

from moecc.passes.pipeline import Result
from tests.models import relative_error
from tests.passes.hand_written import (
    Block,
    E,
    H,
    K,
    check_left_alone,
    check_raised,
    compile_passes,
)

HALF = torch.bfloat16
"""`torch._grouped_mm` takes nothing else on a CPU."""


class TorchTitan(Block):
    """As torchtitan writes it, in steps that others may write otherwise."""

    on_input = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.route(x)
        order, counts = self.order(ids), self.counts(ids)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        tokens = self.tokens(order, x)
        sorted_weights = weights.view(-1)[order]
        rows = self.rows(x, tokens)
        if self.on_input:
            rows = (rows.float() * sorted_weights.reshape(-1, 1)).to(x.dtype)
        rows = self.experts(rows, offsets)
        if not self.on_input:
            rows = (rows.float() * sorted_weights.reshape(-1, 1)).to(x.dtype)
        return self.back(rows, order, tokens, x)

    def order(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.argsort(ids.view(-1), stable=True)

    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.histc(ids.view(-1).float(), bins=E, min=0, max=E)

    def tokens(self, order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return order // self.active

    def rows(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.gather(x, 0, tokens.reshape(-1, 1).expand(-1, H))

    def experts(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        h = F.silu(torch._grouped_mm(rows, self.w1.transpose(-2, -1), offs=offsets))
        h = h * torch._grouped_mm(rows, self.w3.transpose(-2, -1), offs=offsets)
        return torch._grouped_mm(h, self.w2.transpose(-2, -1), offs=offsets)

    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        index = tokens.reshape(-1, 1).expand(-1, H)
        return torch.zeros_like(x).scatter_add(0, index, rows)


class ScoreBeforeExperts(TorchTitan):
    on_input = True


class OntoShared(ScoreBeforeExperts):
    """Added onto a shared expert's output."""

    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        shared = F.linear(F.silu(F.linear(x, self.w1[0])), self.w2[0])
        return shared.scatter_add(0, tokens.reshape(-1, 1).expand(-1, H), rows)


class IndexAdd(TorchTitan):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return torch.zeros_like(x).index_add(0, tokens, rows)


class IndexAddInPlace(TorchTitan):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros(x.shape, dtype=x.dtype)
        out.index_add_(0, tokens, rows)
        return out + x


class ScatterAddInPlace(TorchTitan):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        out = x.new_zeros(x.shape)
        return out.scatter_add_(0, tokens[:, None].expand(-1, H), rows) * 2


class Unsorted(TorchTitan):
    """Put back and summed, as later torchtitan does."""

    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        unsorted = torch.zeros_like(rows)
        unsorted[order] = rows
        return unsorted.reshape(-1, K, H).sum(dim=1)


class UnsortedThenWeighed(Unsorted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.route(x)
        order = self.order(ids)
        offsets = torch.cumsum(self.counts(ids), dim=0, dtype=torch.int32)
        rows = self.experts(self.rows(x, self.tokens(order, x)), offsets)
        unsorted = torch.zeros_like(rows)
        unsorted[order] = rows
        terms = unsorted.reshape(-1, K, H).float()
        return torch.bmm(weights.reshape(-1, 1, K).float(), terms).to(x.dtype).squeeze(1)


class InverseOrder(TorchTitan):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return rows[order.argsort()].view(-1, K, H).sum(1)


class InverseByArange(TorchTitan):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return rows.index_select(0, inverse).view(-1, K, H).sum(1)


class SortedOnce(TorchTitan):
    """The order comes with the sorted ids, which are counted."""

    def order(self, ids: torch.Tensor) -> torch.Tensor:
        self.sorted, order = ids.flatten().sort()
        return order

    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.histc(self.sorted.to(torch.int32).float(), E, 0, E - 1)


class OneHotCounts(TorchTitan):
    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        return F.one_hot(ids.flatten(), E).sum(0)


class IndexedRows(TorchTitan):
    def rows(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return x[tokens]


class NumberedTokens(TorchTitan):
    def tokens(self, order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.arange(x.shape[0]).repeat_interleave(K)[order]


class FloorDivided(TorchTitan):
    def tokens(self, order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.div(order, K, rounding_mode="floor")


class Merged(TorchTitan):
    def experts(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        both = F.grouped_mm(rows, self.w13.transpose(-2, -1), offs=offsets)
        gate, up = both.chunk(2, dim=-1)
        return F.grouped_mm(F.gelu(gate) * up, self.w2.transpose(-2, -1), offs=offsets)


class CountsUsedElsewhere(TorchTitan):
    """A load-balancing statistic in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        counts = super().counts(ids)
        self.load.add_(counts)
        return counts


class TopOne(TorchTitan):
    active = 1


class CastMatrices(TorchTitan):
    """Weights of float32 that are used as bfloat16."""

    def experts(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        rows = rows.bfloat16()
        h = F.silu(torch._grouped_mm(rows, self.w1.bfloat16().mT, offs=offsets))
        h = h * torch._grouped_mm(rows, self.w3.bfloat16().mT, offs=offsets)
        return torch._grouped_mm(h, self.w2.bfloat16().transpose(-2, -1), offs=offsets)

    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return super().back(rows.type_as(x), order, tokens, x)


SPELLINGS = (
    TorchTitan, ScoreBeforeExperts, OntoShared, IndexAdd, IndexAddInPlace, ScatterAddInPlace,
    Unsorted, UnsortedThenWeighed, InverseOrder, InverseByArange, SortedOnce, OneHotCounts,
    IndexedRows, NumberedTokens, FloorDivided, Merged, CountsUsedElsewhere, TopOne,
)  # fmt: skip


@pytest.mark.parametrize("model", SPELLINGS)
def test_a_spelling_is_raised_and_computes_the_same(model: type[Block]) -> None:
    block = check_raised(model(), "sorted_rows", dtype=HALF)
    before = model in (ScoreBeforeExperts, OntoShared)
    assert block.weighs == ("input" if before else "output")


def test_matrices_may_be_cast_whole() -> None:
    torch.manual_seed(1)
    model, results = CastMatrices(), list[Result]()
    compiled, x = compile_passes(model, results), torch.randn(9, H)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 2e-2
    assert results[0].program.blocks[0].dtype is HALF


def test_one_token_and_one_expert_for_all_are_no_exception() -> None:
    model, results = TorchTitan().to(HALF), list[Result]()
    with torch.no_grad():
        model.gate.weight[1:] = model.gate.weight[:1] - 9
        x = torch.randn(1, H, dtype=HALF)
        assert relative_error(compile_passes(model, results)(x), model(x)) < 2e-2
    assert len(results[0].program.blocks) == 1


@pytest.mark.parametrize("model", [TorchTitan, ScoreBeforeExperts, OntoShared])
def test_the_native_kernels_agree(model: type[Block]) -> None:
    check_raised(model(), "sorted_rows", dtype=HALF, kernels="auto")


class Descending(TorchTitan):
    def order(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.argsort(ids.view(-1), -1, True)


class NotSorted(TorchTitan):
    def order(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(ids.numel()).flip(0)


class FewerBins(TorchTitan):
    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.histc(ids.view(-1).float(), bins=E, min=0, max=2 * E)


class OtherIdsCounted(TorchTitan):
    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        return super().counts((ids + 1) % E)


class OffsetsReversed(TorchTitan):
    def experts(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return super().experts(rows, offsets.flip(0).cummax(0)[0])


class RowsOfOtherTokens(TorchTitan):
    def rows(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return super().rows(x, tokens.flip(0))


class WrongDivisor(TorchTitan):
    def tokens(self, order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return order // 3


class ChoicesForTokens(TorchTitan):
    def tokens(self, order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return order % K


class TokensRepeatedAsAWhole(TorchTitan):
    def rows(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return x.repeat(K, 1)[self.kept]

    def order(self, ids: torch.Tensor) -> torch.Tensor:
        self.kept = super().order(ids)
        return self.kept


class BackToOtherTokens(TorchTitan):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return super().back(rows, order, tokens.flip(0), x)


class AddedTwice(TorchTitan):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return torch.zeros_like(x).index_add(0, tokens, rows, alpha=2)


class HalfOfTheFeatures(TorchTitan):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        index = tokens.reshape(-1, 1).expand(-1, H // 2)
        return torch.zeros_like(x).scatter_add(0, index, rows)


class OntoInPlace(TorchTitan):
    """What is added onto may be seen through another view."""

    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        shared = x * 2
        shared.view(-1, H).index_add_(0, tokens, rows)
        return shared


class OntoOnes(TorchTitan):
    """Zeros when they were made, and something else when they are added to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.out = torch.zeros_like(x)
        self.out.add_(1)
        return super().forward(x)

    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return self.out.index_add(0, tokens, rows)


class CountsTooSmall(TorchTitan):
    """More tokens than the counts can hold."""

    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        return F.one_hot(ids.flatten(), E).sum(0).to(torch.int8)


class ReadTooEarly(TorchTitan):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(x)
        before = out + x
        out.index_add_(0, tokens, rows)
        return out * before


class PutBackInSortedOrder(Unsorted):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return rows[order].reshape(-1, K, H).sum(dim=1)


class SortedRowsUsedElsewhere(TorchTitan):
    def back(
        self, rows: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return super().back(rows, order, tokens, x) + rows.amax(0)


@pytest.mark.parametrize(
    "model",
    [
        Descending, NotSorted, FewerBins, OtherIdsCounted, OffsetsReversed, RowsOfOtherTokens,
        WrongDivisor, ChoicesForTokens, TokensRepeatedAsAWhole, BackToOtherTokens, AddedTwice,
        HalfOfTheFeatures, OntoInPlace, OntoOnes, CountsTooSmall, ReadTooEarly,
        PutBackInSortedOrder, SortedRowsUsedElsewhere,
    ],
)  # fmt: skip
def test_a_look_alike_is_left_alone(model: type[Block]) -> None:
    check_left_alone(model(), dtype=HALF)

"""Blocks that are nearly a MoE block: raised and equal, or left alone and equal. Never wrong."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import run
from tests.models import EXPERTS, HIDDEN, INTERMEDIATE, BatchedMoe, GroupedMoe, capture, tokens

T = 6


def check(model: GroupedMoe, found: int, **options: Any) -> None:
    """Rewrite the graph of a model and compare everything that it returns."""
    captured = capture(model, tokens(T, torch.float32))
    with torch.no_grad():
        expected = [value.clone() for value in captured.gm(*captured.inputs)]
        result = run(Program(gm=captured.gm), Options(**options))
        got = captured.gm(*captured.inputs)
    assert len(result.program.blocks) == found
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


class Batched(BatchedMoe):
    """`BatchedMoe` with places to differ."""

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def first(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.up[ids], x.unsqueeze(-1)).squeeze(-1)

    def total(self, terms: torch.Tensor) -> torch.Tensor:
        return terms.sum(dim=1)

    def result(self, out: torch.Tensor, rows: torch.Tensor) -> Any:
        return out

    def forward(self, x: torch.Tensor) -> Any:
        ids, weights = self.pick(x)
        flat = ids.reshape(-1)
        x = self.before(x)
        rows = self.first(x.repeat_interleave(2, dim=0), flat)
        terms = torch.bmm(self.low[flat], self.activate(rows).unsqueeze(-1)).squeeze(-1)
        terms = terms * weights.reshape(-1).unsqueeze(-1)
        return self.result(self.total(terms.view(T, 2, HIDDEN)), rows)


class Plain(Batched):
    pass


class InPlaceActivation(Batched):
    def activate(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        F.relu(gate, inplace=True)
        return gate * up


class InPlaceModule(Batched):
    def activate(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return F.silu(gate, inplace=True) * up * gate


class KeptDimension(Batched):
    def total(self, terms: torch.Tensor) -> torch.Tensor:
        return terms.sum(dim=1, keepdim=True)


class ScaledBias(Batched):
    def first(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = super().first(x, ids)
        rows.add_(self.up.sum(-1)[ids], alpha=0.5)
        return rows


class RowsReturned(Batched):
    def result(self, out: torch.Tensor, rows: torch.Tensor) -> Any:
        return out, rows


class FloorDivided(Batched):
    def activate(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return torch.div(gate, 0.25, rounding_mode="floor") * up


class ThroughIntegers(Batched):
    def activate(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return (4 * gate).to(torch.int32).to(torch.float32) * up


class NothingAdded(Batched):
    def activate(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return torch.add(gate, up, alpha=0)


class OneRowsGate(Batched):
    def activate(self, rows: torch.Tensor) -> torch.Tensor:
        return F.silu(rows[:1, :INTERMEDIATE]) * rows[:, INTERMEDIATE:]


class KeywordArguments(Batched):
    def activate(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(chunks=2, dim=-1)
        return F.gelu(input=gate) * up


class StridedWeights(Batched):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(self.up.detach().transpose(1, 2).contiguous().transpose(1, 2))


class Chained(Batched):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(super().forward(x))


class Grouped(GroupedMoe):
    """`GroupedMoe` with other sorting or counting."""

    descending = False
    last = EXPERTS - 1

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def product(self, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, weight.transpose(-2, -1), offs=offsets)

    def forward(self, x: torch.Tensor) -> Any:
        ids, weights = self.pick(x)
        sorted_ids, order = torch.sort(ids.reshape(-1), descending=self.descending)
        counts = torch.histc(sorted_ids.float(), bins=EXPERTS, min=0, max=self.last)
        offsets = counts.cumsum(0, dtype=torch.int32)
        rows = self.product(x[order // 2], self.up, offsets)
        terms = self.product(self.activate(rows), self.low, offsets)
        terms = terms * weights.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return self.result(terms[inverse].view(T, 2, HIDDEN).sum(dim=1), inverse)

    def result(self, out: torch.Tensor, inverse: torch.Tensor) -> Any:
        return out


class Descending(Grouped):
    descending = True


class CountedWrong(Grouped):
    last = 2 * EXPERTS


class InverseReturned(Grouped):
    def result(self, out: torch.Tensor, inverse: torch.Tensor) -> Any:
        return out, inverse


@pytest.mark.parametrize("model", [Plain, Grouped])
def test_the_block_that_the_others_resemble_is_raised(model: type[GroupedMoe]) -> None:
    pytest.importorskip("transformers.integrations.moe")
    check(model(), 1)


@pytest.mark.parametrize("model", [KeptDimension, InverseReturned])
def test_what_no_pattern_matches_is_raised_where_its_products_are_read(
    model: type[GroupedMoe],
) -> None:
    pytest.importorskip("transformers.integrations.moe")
    check(model(), 1)


def test_blocks_without_a_residual_between_them_are_raised() -> None:
    check(Chained(), 2)


@pytest.mark.parametrize(
    "model",
    [
        InPlaceActivation, InPlaceModule, ScaledBias, RowsReturned, FloorDivided,
        ThroughIntegers, NothingAdded, OneRowsGate, KeywordArguments, StridedWeights, Descending,
        CountedWrong,
    ],
)  # fmt: skip
def test_a_look_alike_is_left_alone(model: type[GroupedMoe]) -> None:
    pytest.importorskip("transformers.integrations.moe")
    check(model(), 0)

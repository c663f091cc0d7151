from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moecc.passes.detect_moe import detect_moe
from moecc.passes.ir import Outcome, Program
from moecc.passes.options import Options
from tests.models import BatchedMoe, Dense, GroupedMoe, capture, tokens


def detect(model: nn.Module, *inputs: Any) -> Outcome:
    return detect_moe(Program(gm=capture(model, *inputs).gm), Options())


@pytest.mark.parametrize(
    ("model", "style"), [(GroupedMoe, "grouped_mm"), (BatchedMoe, "batched_mm")]
)
def test_finds_a_block_and_reads_it(model: type[GroupedMoe], style: str) -> None:
    outcome = detect(model(), tokens(6))
    (block,) = outcome.program.blocks
    assert block.style == style
    assert (block.experts, block.active, block.hidden_size, block.intermediate) == (4, 2, 16, 8)
    assert str(block.activation) == "mul(silu(gate), up)"
    assert (block.gated, block.interleaved, block.transposed) == (True, False, False)
    assert block.weight_bytes == 4 * 3 * 16 * 8 * 2
    assert block.source.startswith("models.py:")
    assert not outcome.misses


def test_a_top_k_and_a_sum_are_not_a_block() -> None:
    outcome = detect(Dense(), tokens(4, torch.float32))
    assert outcome.program.blocks == ()
    assert outcome.misses == ()


def test_running_twice_is_running_once() -> None:
    once = detect(GroupedMoe(), tokens(6))
    twice = detect_moe(once.program, Options())
    assert twice.program == once.program


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = GroupedMoe(), BatchedMoe()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(x + self.one(x))


def test_finds_blocks_of_different_styles_in_order() -> None:
    blocks = detect(TwoLayers(), tokens(6)).program.blocks
    assert [block.path for block in blocks] == ["one", "two"]


class ShiftedGate(GroupedMoe):
    """Weights of the wrong tokens: the order of the routing weights is not the tokens' order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        tokens, active = ids.shape
        sorted_ids, order = torch.sort(ids.reshape(-1))
        counts = torch.histc(sorted_ids.float(), bins=4, min=0, max=3)
        offsets = counts.cumsum(0, dtype=torch.int32)
        rows = self.product(x[order // active], self.up, offsets)
        terms = self.product(self.activate(rows), self.low, offsets)
        terms = terms * weights.reshape(-1)[order.flip(0)].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return terms[inverse].view(tokens, active, x.shape[-1]).sum(dim=1)


class OtherOffsets(GroupedMoe):
    """Two products over different groups."""

    def product(self, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return super().product(x, weight, offsets if weight is self.up else offsets.flip(0))


class ChangedInTheMiddle(BatchedMoe):
    """The tokens are overwritten after the block read them and before its result is there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        ids, weights = self.pick(x)
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(2, dim=0)
        x.add_(1)
        rows = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1)
        terms = torch.bmm(self.low[flat], self.activate(rows).unsqueeze(-1)).squeeze(-1)
        terms = terms * weights.reshape(-1).unsqueeze(-1)
        return terms.view(x.shape[0], 2, x.shape[-1]).sum(dim=1)


class SummedOverTokens(BatchedMoe):
    """The sum runs over pairs of tokens, not over a token's experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(2, dim=0)
        rows = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1)
        terms = torch.bmm(self.low[flat], self.activate(rows).unsqueeze(-1)).squeeze(-1)
        terms = terms * weights.reshape(-1).unsqueeze(-1)
        return terms.view(x.shape[0] // 2, 4, x.shape[-1]).sum(dim=1)


class Normed(BatchedMoe):
    """The activation is not elementwise."""

    def activate(self, rows: torch.Tensor) -> torch.Tensor:
        return F.softmax(super().activate(rows), dim=-1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ShiftedGate, "expected"),
        (OtherOffsets, "expected"),
        (ChangedInTheMiddle, "in place in the middle"),
        (SummedOverTokens, "does not run over a token's experts"),
        (Normed, "softmax"),
    ],
)
def test_a_look_alike_is_a_miss_with_a_reason(model: type[GroupedMoe], reason: str) -> None:
    outcome = detect(model(), tokens(6))
    assert outcome.program.blocks == ()
    (miss,) = outcome.misses
    assert reason in miss.why


def test_blocks_of_a_graph_that_trains_are_misses() -> None:
    graph = capture(GroupedMoe(), tokens(6)).gm
    outcome = detect_moe(Program(gm=graph, trains=True), Options())
    assert outcome.program.blocks == ()
    assert "gradients are wanted" in outcome.misses[0].why

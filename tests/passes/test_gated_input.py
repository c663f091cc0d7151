"""All experts computed for tokens that are zero where they are not chosen: Llama 4."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, run
from tests.models import relative_error
from tests.passes.hand_written import Block, E, H, check_left_alone, check_raised


class Llama4(Block):
    """In steps that others may write otherwise."""

    input_major = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, H)
        rows = self.enter(x, self.gates(self.gate(x)))
        y = torch.bmm(self.act(torch.bmm(rows.view(E, -1, H), self.w13)), self.w2).view(-1, H)
        return self.combine(y)

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        values, ids = torch.topk(logits, self.active, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, values)
        return torch.sigmoid(scores.float()).to(scores.dtype)

    def enter(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return x.repeat(E, 1) * gates.transpose(0, 1).reshape(-1, 1)

    def act(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return up * F.silu(gate)

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        return y.reshape(E, -1, H).sum(dim=0)


class Einsums(Llama4):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.einsum("th,te->teh", x, self.gates(self.gate(x)))
        rows = self.act(torch.einsum("teh,ehf->tef", rows, self.w13))
        return torch.einsum("tef,efh->th", rows, self.w2)


class Expanded(Llama4):
    def enter(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return x.expand(E, -1, -1) * gates.T.unsqueeze(-1)


class TopOne(Llama4):
    active = 1


class Clamped(Llama4):
    """Nothing of nothing, though it clamps."""

    def act(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return up.clamp(-2, 2) * F.gelu(gate.clamp(max=3))


@pytest.mark.parametrize("model", [Llama4, Einsums, Expanded, TopOne, Clamped])
def test_a_spelling_is_raised_and_computes_the_same(model: type[Llama4]) -> None:
    block = check_raised(model(), "gated_input")
    assert (block.weighs, block.active) == ("input", model.active)


def test_half_precision_stays_within_its_rounding() -> None:
    check_raised(Llama4(), "gated_input", dtype=torch.bfloat16)


def test_the_native_kernels_agree() -> None:
    check_raised(Llama4(), "gated_input", kernels="auto")


class Constant(Llama4):
    """An expert that is not chosen adds act(0), which is not zero."""

    def act(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return (up + 1) * gate.sigmoid()


class ClampedAboveZero(Llama4):
    def act(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return up.clamp(min=0.5) * gate.sigmoid()


class Biased(Llama4):
    """An expert that is not chosen adds its bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.einsum("th,te->teh", x, self.gates(self.gate(x)))
        rows = self.act(torch.einsum("teh,ehf->tef", rows, self.w13) + self.b1.repeat(1, 2))
        return (torch.einsum("tef,efh->teh", rows, self.w2) + self.b2).sum(1)


class NotGated(Llama4):
    def enter(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return x.repeat(E, 1)


class WrongRows(Llama4):
    """Gates of [T, E] beside rows of [E, T]."""

    def enter(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return x.repeat(E, 1) * gates.reshape(-1, 1)


class SummedOverOtherRows(Llama4):
    def combine(self, y: torch.Tensor) -> torch.Tensor:
        return y.reshape(-1, E, H).sum(dim=1)


class SoftGates(Llama4):
    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Constant, "add a constant"),
        (ClampedAboveZero, "add a constant"),
        (Biased, ""),
        (NotGated, ""),
        (WrongRows, ""),
        (SummedOverOtherRows, ""),
        (SoftGates, "every expert is used"),
    ],
)
def test_a_look_alike_is_left_alone(model: type[Llama4], reason: str) -> None:
    assert reason in check_left_alone(model())


@pytest.mark.parametrize("active", [1, 2])
def test_the_llama4_of_transformers_is_raised(active: int) -> None:
    pytest.importorskip("transformers")
    from moecc.tiny import tiny_model

    model: Any = tiny_model("llama4", num_experts_per_tok=active)
    results: list[Result] = []

    def passes_only(gm: GraphModule, _: Any) -> GraphModule:
        results.append(run(Program(gm=gm), Options(kernels="torch")))
        return gm

    compiled = torch.compile(model, backend=passes_only, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 16), (2, 9), (3, 5)):
            ids = torch.randint(3, 99, shape)
            expected = model(ids, use_cache=False).logits
            assert relative_error(compiled(ids, use_cache=False).logits, expected) < 1e-5
    blocks = results[0].program.blocks
    assert [block.style for block in blocks] == ["gated_input"] * len(blocks)
    assert len(blocks) == model.config.num_hidden_layers

"""The shared expert beside a block is described; a residual or an attention is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moecc.passes.detect_moe import detect_moe
from moecc.passes.ir import MoeBlock, Program
from moecc.passes.options import Options
from tests.models import HIDDEN, BatchedMoe, capture, tokens

WIDE = 24


class Layer(nn.Module):
    """Experts, and everything that a layer may have beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = BatchedMoe(torch.float32)
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, WIDE, bias=False) for _ in range(2))
        self.gate_up = nn.Linear(HIDDEN, 2 * WIDE)
        self.down = nn.Linear(WIDE, HIDDEN, bias=False)
        self.gate = nn.Linear(HIDDEN, 1, bias=False)
        self.norm = nn.LayerNorm(HIDDEN)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + 1, x * 3)

    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Alone(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + self.experts(x)


class Plain(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + (self.experts(x) + self.mlp(x))


class AfterResidual(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + self.experts(x) + self.mlp(x)


class InPlace(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out = self.experts(x)
        out += self.mlp(x)
        return out.view(-1, 2, HIDDEN)


class Gated(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.experts(x) + F.sigmoid(self.gate(x)) * self.mlp(x)


class Merged(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.experts(x) + self.down(F.gelu(gate) * up)


class Ungated(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.experts(x) + self.down(F.relu(self.up_proj(x)).square())


class Averaged(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return (self.experts(x) + self.mlp(x)) / 2


class Scaled(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.experts(x) * 2.5 + self.mlp(x)


class OwnNorm(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.experts(x) + self.mlp(self.norm(x))


class OtherInput(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.experts(x) + self.mlp(residual)


class Attention(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        scores = self.gate_proj(x) @ self.up_proj(x).T + torch.arange(len(x))
        return self.experts(x) + self.down(scores.softmax(-1) @ self.up_proj(x))


class Parallel(Layer):
    """What is added is the residual and a product of the hidden state."""

    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.experts(x) + (residual + self.mlp(x))


class ScaledInput(Layer):
    def layer(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.experts(x) + x * 0.5


def described(model: Layer) -> MoeBlock:
    graph = capture(model, tokens(6, torch.float32)).gm
    (block,) = detect_moe(Program(gm=graph), Options()).program.blocks
    return block


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Plain, "gated silu MLP of 24"),
        (AfterResidual, "gated silu MLP of 24"),
        (InPlace, "gated silu MLP of 24"),
        (Gated, "gated silu MLP of 24 × sigmoid gate"),
        (Merged, "gated gelu MLP of 24"),
        (Ungated, "relu → square MLP of 24"),
        (Averaged, "gated silu MLP of 24, the sum ÷ 2"),
        (Scaled, "gated silu MLP of 24"),
    ],
)
def test_describes_a_shared_expert(model: type[Layer], text: str) -> None:
    assert str(described(model()).shared) == text


@pytest.mark.parametrize("model", [Alone, OtherInput, Attention, Parallel, ScaledInput])
def test_what_is_no_function_of_the_hidden_state_alone_is_no_shared_expert(
    model: type[Layer],
) -> None:
    assert described(model()).shared is None


def test_an_unusual_shared_expert_is_said_to_be_unread() -> None:
    shared = described(OwnNorm()).shared
    assert shared is not None
    assert str(shared).startswith("unknown: linear_2 (test_shared.py:")
    assert shared.intermediate is None


def test_a_scale_of_the_output_belongs_to_the_router() -> None:
    router = described(Scaled()).router
    assert str(router) == "softmax → top-2 → ÷ sum → × 2.5 on the output"


def test_a_description_is_plain_data() -> None:
    shared = described(Averaged()).shared
    assert shared is not None
    plain = shared.to_dict()
    assert plain["text"] == str(shared)
    assert (plain["intermediate"], plain["gated"], plain["activation"]) == (24, True, ["silu"])
    assert plain["then"] == {"step": "Scale", "by": 2.0, "divides": True, "on_output": False}

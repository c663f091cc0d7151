"""What a user may feed by mistake gets a right answer or a clear error."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import moecc
from moecc.records import all_records
from moecc.runtime import ops
from moecc.runtime.errors import InputError
from moecc.tiny import tiny_model
from tests.models import HIDDEN, BatchedMoe, relative_error, tokens

EAGER = {"inner": "eager"}


def both(model: torch.nn.Module, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Run plainly and compiled; count the blocks of the newest graph."""
    with torch.no_grad():
        expected = model(*inputs)
        got = torch.compile(model, backend="moecc", fullgraph=True, options=EAGER)(*inputs)
    return got, expected, len(all_records()[-1].blocks)


@pytest.mark.parametrize("count", [0, 1, 2, 33])
def test_any_number_of_tokens_runs(count: int) -> None:
    got, expected, blocks = both(BatchedMoe(torch.float32), tokens(count, torch.float32))
    assert got.shape == expected.shape
    assert relative_error(got, expected) < 1e-5
    assert blocks == 1


@pytest.mark.parametrize(("experts", "active"), [(1, 1), (4, 4), (7, 3)])
def test_one_expert_and_all_experts_are_right(experts: int, active: int) -> None:
    model = BatchedMoe(torch.float32, active=active, experts=experts)
    got, expected, blocks = both(model, tokens(9, torch.float32))
    assert relative_error(got, expected) < 1e-5
    assert blocks == 1


def test_float64_weights_run_in_float64_and_are_reported() -> None:
    model = BatchedMoe(torch.float64)
    got, expected, blocks = both(model, tokens(9, torch.float64))
    assert got.dtype is torch.float64
    assert relative_error(got, expected) < 1e-12
    assert blocks == 1
    assert "torch runs instead" in str(moecc.report(model))


def test_integer_weights_are_left_alone() -> None:
    class IntegerMoe(BatchedMoe):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).to(torch.int32)

        def activate(self, rows: torch.Tensor) -> torch.Tensor:
            gate, up = rows.chunk(2, dim=-1)
            return F.relu(gate) * up

    model = IntegerMoe(torch.float32)
    for name in ("up", "low"):
        value = torch.randint(-3, 4, getattr(model, name).shape, dtype=torch.int32)
        delattr(model, name)
        model.register_buffer(name, value)
    model.pick = _IntegerRouter()
    got, expected, blocks = both(model, torch.randint(-3, 4, (5, HIDDEN), dtype=torch.int32))
    assert torch.equal(got, expected)
    assert blocks == 0
    assert "torch.int32" in str(all_records()[-1].misses)


class _IntegerRouter(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = x[:, :4].topk(2, -1)
        return ids, weights


def test_nan_propagates_to_its_own_token_only() -> None:
    x = tokens(5, torch.float32)
    model = BatchedMoe(torch.float32)
    with torch.no_grad():
        ids, weights = model.pick(x)
    x[2, 3] = float("nan")
    model.pick = _Fixed(ids, weights)
    got, expected, _ = both(model, x)
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[2].isnan().all()
    assert not got[[0, 1, 3, 4]].isnan().any()


class _Fixed(torch.nn.Module):
    def __init__(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        super().__init__()
        self.ids, self.weights = ids, weights

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids, self.weights


def test_non_contiguous_inputs_are_right() -> None:
    x = torch.randn(HIDDEN, 9).T
    assert not x.is_contiguous()
    got, expected, blocks = both(BatchedMoe(torch.float32), x)
    assert relative_error(got, expected) < 1e-5
    assert blocks == 1


def test_grad_mode_leaves_the_graph_alone_and_says_so() -> None:
    model = BatchedMoe(torch.float32)
    x = tokens(5, torch.float32)
    model(x).sum().backward()
    expected = model.low.grad.clone()
    model.zero_grad()
    torch.compile(model, backend="moecc", options={"inner": "aot_eager"})(x).sum().backward()
    torch.testing.assert_close(model.low.grad, expected)
    assert "gradients are wanted" in str(moecc.report(model))


def test_a_transformers_model_in_grad_mode_trains_as_before() -> None:
    model: Any = tiny_model("qwen3_moe")
    ids = torch.randint(3, 99, (1, 8))
    model(ids).logits.sum().backward()
    parameter = model.model.layers[0].mlp.experts.down_proj
    expected = parameter.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="moecc", options={"inner": "aot_eager"})
    compiled(ids).logits.sum().backward()
    torch.testing.assert_close(parameter.grad, expected)
    report = moecc.report(model)
    assert not any(graph.blocks for graph in report.graphs)
    assert "gradients are wanted" in str(report)


@pytest.mark.parametrize("road", ["eager", "compiled"])
def test_a_router_trained_alone_gets_its_gradient(road: str) -> None:
    model: Any = tiny_model("qwen3_moe")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp.gate" in name)
    ids = torch.randint(3, 99, (1, 8))
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    model(ids).logits.square().sum().backward()
    expected = [router.grad.clone() for router in routers]
    model.zero_grad()
    compiled = torch.compile(model, backend="moecc", options={"inner": "aot_eager"})
    (model if road == "eager" else compiled)(ids).logits.square().sum().backward()
    for router, gradient in zip(routers, expected, strict=True):
        torch.testing.assert_close(router.grad, gradient)


class _Wrapped(torch.Tensor):
    """A tensor subclass that we do not know, as tensor-parallel or quantized weights are."""


def test_weights_of_an_unknown_kind_keep_the_models_own_code() -> None:
    model: Any = tiny_model("qwen3_moe")
    ids = torch.randint(3, 99, (1, 8))
    with torch.no_grad():
        expected = model(ids).logits
        for layer in model.model.layers:
            weight = layer.mlp.experts.gate_up_proj.detach()
            del layer.mlp.experts.gate_up_proj
            layer.mlp.experts.gate_up_proj = weight.as_subclass(_Wrapped)
        got = torch.compile(model, backend="moecc", options=EAGER)(ids).logits
        torch.testing.assert_close(got.as_subclass(torch.Tensor), expected)
        model(ids)
    report = moecc.report(model)
    assert not any(graph.blocks for graph in report.graphs)
    assert "_Wrapped" in str(report)
    assert report.eager is not None
    assert (report.eager.calls, report.eager.own_calls) == (0, 2)


def test_weights_without_data_are_refused_loudly() -> None:
    weight = torch.empty(2, 8, 4, device="meta")
    with pytest.raises(InputError, match="meta device"):
        torch.ops.moecc.experts(
            torch.randn(1, 4, device="meta"),
            torch.zeros(1, 1, dtype=torch.int64, device="meta"),
            torch.ones(1, 1, device="meta"),
            weight,
            torch.empty(2, 4, 4, device="meta"),
            *[None] * 4,
            "torch: any",
        )


def test_a_kernel_that_is_not_installed_is_named() -> None:
    x = torch.randn(1, 4)
    with pytest.raises(InputError, match="not installed"):
        ops_call(x)


def ops_call(x: torch.Tensor) -> torch.Tensor:
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    w = torch.randn(1, 4, 4)
    assert "nothing" not in ops.calls
    return torch.ops.moecc.experts(x, ids, weights, w, w, *[None] * 4, "nothing")

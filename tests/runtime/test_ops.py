import pytest
import torch

from moecc.runtime import ops
from moecc.runtime.errors import InputError

T, K, E, H, OUT = 5, 2, 3, 4, 6


@pytest.fixture
def tensors() -> tuple[torch.Tensor, ...]:
    ids = torch.randint(0, E, (T, K))
    return torch.randn(T, H), ids, torch.randn(E, OUT, H), torch.randn(E, OUT)


def test_expert_linear_is_one_product_for_each_choice(tensors: tuple[torch.Tensor, ...]) -> None:
    x, ids, weight, bias = tensors
    expected = (torch.einsum("tkoh,th->tko", weight[ids], x) + bias[ids]).flatten(0, 1)
    torch.testing.assert_close(torch.ops.moecc.expert_linear(x, ids, weight, bias, False), expected)
    turned = weight.transpose(1, 2).contiguous()
    torch.testing.assert_close(torch.ops.moecc.expert_linear(x, ids, turned, bias, True), expected)


def test_expert_linear_takes_a_row_for_each_choice(tensors: tuple[torch.Tensor, ...]) -> None:
    _, ids, weight, _ = tensors
    x = torch.randn(T * K, H)
    expected = torch.einsum("soh,sh->so", weight[ids.flatten()], x)
    torch.testing.assert_close(torch.ops.moecc.expert_linear(x, ids, weight, None, False), expected)


def test_an_id_outside_the_experts_contributes_nothing(tensors: tuple[torch.Tensor, ...]) -> None:
    x, ids, weight, bias = tensors
    ids[1, 0] = E
    out = torch.ops.moecc.expert_linear(x, ids, weight, bias, False)
    assert out[K].eq(0).all()
    assert out[K + 1].ne(0).any()


def test_combine_sums_in_float32() -> None:
    y = torch.full((256, 1), 1.0, dtype=torch.bfloat16)
    out = torch.ops.moecc.combine(y, torch.full((1, 256), 1.01))
    assert out.item() == pytest.approx(256 * 1.01, rel=4e-3)


@pytest.mark.parametrize("name", ["expert_linear", "combine"])
def test_operators_pass_torchs_own_checks(name: str, tensors: tuple[torch.Tensor, ...]) -> None:
    x, ids, weight, bias = tensors
    args = {
        "expert_linear": (x, ids, weight, bias, False),
        "combine": (torch.randn(T * K, H), torch.rand(T, K)),
    }[name]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.moecc, name).default, args, test_utils=checks)


def test_calls_are_counted() -> None:
    def double(hidden: torch.Tensor, *_: object) -> torch.Tensor:
        return 2 * hidden

    ops.install("test: double", double)
    before = ops.calls["test: double"]
    x, ids, w = torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 4, 4)
    out = torch.ops.moecc.experts(x, ids, torch.ones(1, 1), w, w, *[None] * 4, "test: double")
    assert out.tolist() == [[2, 2, 2, 2]]
    assert ops.calls["test: double"] == before + 1


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    y, weights = torch.randn(T * K, H), torch.rand(T, K, requires_grad=True)
    with pytest.raises(InputError, match="no gradient"):
        torch.ops.moecc.combine(y, weights).sum().backward()

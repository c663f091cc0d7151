"""Packages that people install for a mixture of experts, as they are."""

import copy
from typing import Any

import pytest
import torch

import moecc
from tests.models import relative_error

WIDTH = 32


def outputs_of(model: Any, other: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Call both on the same tokens; some routers draw random numbers."""
    x = torch.randn(2, length, WIDTH)
    results: list[torch.Tensor] = []
    for one in (model, other):
        torch.manual_seed(length)
        results.append(one(x)[0])
    return results[0], results[1]


@pytest.mark.parametrize("policy", ["random", "all", "none"])
def test_mixture_of_experts_is_raised(policy: str) -> None:
    package = pytest.importorskip("mixture_of_experts")
    model = package.MoE(dim=WIDTH, num_experts=4, hidden_dim=48, second_policy_eval=policy).eval()
    plain = copy.deepcopy(model)
    options = {"inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="moecc", fullgraph=True, options=options)
    with torch.no_grad():
        for length in (9, 14, 40, 1):
            got, expected = outputs_of(compiled, plain, length)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    report = moecc.report(model)
    assert [len(graph.blocks) for graph in report.graphs][:2] == [1, 1]
    assert len(report.graphs) <= 3, "a graph for each length"


def test_mixture_of_experts_in_two_levels_is_left_alone_and_says_why() -> None:
    package = pytest.importorskip("mixture_of_experts")
    model = package.HeirarchicalMoE(dim=WIDTH, num_experts=(2, 3), hidden_dim=48).eval()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moecc", options={"inner": "eager"})
    with torch.no_grad():
        got, expected = outputs_of(compiled, plain, 9)
    assert torch.equal(got, expected)
    (graph,) = moecc.report(model).graphs
    assert not graph.blocks
    assert any("matrices are [2, 3, 48, 32]" in miss["why"] for miss in graph.misses)


def trained(model: Any, seed: int) -> Any:
    """Give a model parameters as after training: its multiplicative biases begin as ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(torch.randn(one.shape, generator=generator) / 8)
    return model.eval()


@pytest.mark.parametrize(("straight_through", "seed"), [(True, 0), (False, 1)])
def test_st_moe_pytorch_is_raised(straight_through: bool, seed: int) -> None:
    package = pytest.importorskip("st_moe_pytorch")
    torch.manual_seed(seed)
    model = package.MoE(
        dim=WIDTH,
        num_experts=4,
        gating_top_n=2 + seed % 2,
        straight_through_dispatch_tensor=straight_through,
    )
    model = trained(model, seed)
    plain = copy.deepcopy(model)
    options = {"inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="moecc", fullgraph=True, options=options)
    with torch.no_grad():
        for length in (9, 14, 40, 1):
            got, expected = outputs_of(compiled, plain, length)
            assert relative_error(got, expected) < 1e-5
        alike = (
            torch.randn(1, 1, WIDTH).expand(2, 40, WIDTH).contiguous()
        )  # all want the same experts
        torch.manual_seed(seed)
        expected = plain(alike)[0]
        torch.manual_seed(seed)
        assert relative_error(compiled(alike)[0], expected) < 1e-5
        assert (expected == 0).all(-1).any(), "no token was dropped"
    report = moecc.report(model)
    assert [len(graph.blocks) for graph in report.graphs][:2] == [1, 1]
    assert len(report.graphs) <= 3, "a graph for each length"


@pytest.mark.parametrize("noise", [False, True])
def test_a_sparse_block_of_st_moe_pytorch_is_raised(noise: bool) -> None:
    package = pytest.importorskip("st_moe_pytorch")
    torch.manual_seed(0)
    moe = package.MoE(dim=WIDTH, num_experts=6, gating_top_n=3, expert_hidden_mult=2)
    model = trained(package.SparseMoEBlock(moe, add_ff_before=True, add_ff_after=True), 0)
    plain = copy.deepcopy(model)
    options = {"inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="moecc", options=options)
    with torch.no_grad():
        for length in (5, 33):
            x = torch.randn(3, length, WIDTH)
            torch.manual_seed(1)
            expected = plain(x, noise_gates=noise)
            torch.manual_seed(1)
            got = compiled(x, noise_gates=noise)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert [len(graph.blocks) for graph in moecc.report(model).graphs] == [1, 1]


def test_weights_of_st_moe_pytorch_may_change_between_calls() -> None:
    package = pytest.importorskip("st_moe_pytorch")
    model = trained(package.MoE(dim=WIDTH, num_experts=4), 0)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moecc", options={"inner": "eager", "strict": True})
    with torch.no_grad():
        for seed in range(3):
            state = trained(copy.deepcopy(plain), seed).state_dict()
            plain.load_state_dict(state)
            model.load_state_dict(state, assign=seed == 2)
            got, expected = outputs_of(compiled, plain, 12)
            assert relative_error(got, expected) < 1e-5

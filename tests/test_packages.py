"""Packages that people install for a mixture of experts, as they are."""

import copy
from typing import Any

import pytest
import torch

import moecc

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

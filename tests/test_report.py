import json

import torch
from torch import nn

import moecc
from tests.models import GroupedMoe, tokens

OPTIONS = {"inner": "eager", "kernels": "torch"}


def test_a_report_is_readable_and_json() -> None:
    model = GroupedMoe()
    compiled = torch.compile(model, backend="moecc", options=OPTIONS)
    with torch.no_grad():
        for _ in range(3):
            compiled(tokens(6))
    report = moecc.report(compiled)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["graphs"][0]["calls"] == 3
    assert plain["graphs"][0]["blocks"][0]["kernel"].startswith("torch: mul(silu(gate), up)")
    for word in ("grouped_mm", "models.py:", "torch: mul(silu(gate), up) bfloat16 E4 H16 I8 cpu"):
        assert word in str(report)


def test_reports_of_two_models_are_apart() -> None:
    one, two = GroupedMoe(), GroupedMoe()
    with torch.no_grad():
        torch.compile(one, backend="moecc", options=OPTIONS)(tokens(6))
    assert len(moecc.report(one).graphs) == 1
    assert moecc.report(two).graphs == ()


def test_a_model_never_called_is_said_to_be_so() -> None:
    model = GroupedMoe()
    torch.compile(model, backend="moecc", options=OPTIONS)
    assert moecc.report(model).notes


def test_dynamos_recompile_limit_is_noticed() -> None:
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="moecc", dynamic=False, options=OPTIONS)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for rows in range(1, 5):
            compiled(torch.ones(rows, 2))
    assert "recompile limit" in str(moecc.report(model))

"""Experts that are modules, each called on its own buffer: one call."""

import pytest
import torch
from torch import nn

import moecc
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pattern import op_name
from moecc.passes.pipeline import run
from tests.models import EXPERTS, HIDDEN, INTERMEDIATE, capture
from tests.passes.apart import (
    KINDS,
    SPELLINGS,
    Apart,
    ApartTwoChoices,
    Multiplied,
)
from tests.passes.dispatched import Dispatched, Proportional, Stacked
from tests.passes.rewriting import rewritten, tokens


def to_one_expert(model: Dispatched) -> None:
    preference = torch.tensor([-2.0, 1.0, 2.0, -1.0])
    model.router.weight.data = preference[:, None].expand(EXPERTS, HIDDEN).contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_experts_called_one_by_one_become_one_call(
    spelling: type[Apart], kind: type[nn.Module]
) -> None:
    model = spelling(kind)
    compiled = rewritten(model)
    assert max(compiled.error(tokens(count)) for count in (6, 11, 1)) < 1e-5
    to_one_expert(model)
    assert compiled.error(tokens().abs()) < 1e-5
    assert set(compiled.blocks) == {1}
    (block,) = compiled.results[0].program.blocks
    assert (block.style, block.experts, block.intermediate) == ("capacity", EXPERTS, INTERMEDIATE)


class ApartStacked(Stacked, Apart):
    """Choices side by side, experts from a list."""

    experts = Apart.experts


@pytest.mark.parametrize("kind", [ApartTwoChoices, ApartStacked])
def test_tokens_may_have_several_choices(kind: type[Apart]) -> None:
    model = kind(Multiplied)
    compiled = rewritten(model)
    assert max(compiled.error(tokens(count)) for count in (6, 13)) < 1e-5
    to_one_expert(model)
    assert compiled.error(tokens().abs()) < 1e-5
    assert set(compiled.blocks) == {1}


class ApartProportional(Proportional, Apart):
    """Buffers that grow with the tokens, experts from a list."""

    experts = Apart.experts

    def __init__(self) -> None:
        Apart.__init__(self)


def test_buffers_that_grow_with_the_tokens_need_no_other_graph() -> None:
    compiled = rewritten(ApartProportional(), dynamic=True)
    assert max(compiled.error(tokens(count)) for count in (8, 5, 13, 40)) < 1e-5
    assert compiled.blocks == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_calls_is_left(kind: type[nn.Module]) -> None:
    gm = capture(Apart(kind), tokens()).gm
    run(Program(gm=gm), Options(kernels="torch"))
    names = [op_name(node) for node in gm.graph.nodes]
    assert names.count("experts") == 1
    assert not {"linear", "einsum", "bmm", "gelu", "silu", "relu"}.intersection(
        names[names.index("argmax") :]
    )


def test_weights_are_read_where_the_model_has_them() -> None:
    model = Apart(Multiplied)
    compiled = rewritten(model)
    assert compiled.error(tokens()) < 1e-5
    places = [one.wide.weight.data_ptr() for one in model.mlps]
    size = model.mlps[0].wide.weight.numel() * 4
    assert places == [places[0] + number * size for number in range(EXPERTS)]
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(1.5)
    assert compiled.error(tokens()) < 1e-5
    model.load_state_dict(
        {k: torch.randn_like(v) / 4 for k, v in model.state_dict().items()}, assign=True
    )
    assert compiled.error(tokens()) < 1e-5
    assert set(compiled.blocks) == {1}


def test_one_graph_serves_several_layers() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Apart(Multiplied) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    torch.manual_seed(0)
    model = Layers()
    expected = model(tokens())
    for layer in model.layers:
        layer.compile(backend="moecc", options={"inner": "eager", "kernels": "torch"})
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-6)
    graphs = moecc.report(model).graphs
    assert [len(graph.blocks) for graph in graphs] == [1]
    assert graphs[0].calls == 3

"""Experts that are modules, each called on its own buffer: one call, or left as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moecc
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pattern import op_name
from moecc.passes.pipeline import run
from tests.models import EXPERTS, HIDDEN, INTERMEDIATE, capture
from tests.passes.dispatched import Dispatched, Proportional, Stacked, Tensors, TwoChoices
from tests.passes.rewriting import rewritten, tokens

Call = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Mlp(nn.Module):
    """Linear, gelu, linear."""

    def __init__(self, width: int = INTERMEDIATE) -> None:
        super().__init__()
        self.wide = nn.Linear(HIDDEN, width)
        self.narrow = nn.Linear(width, HIDDEN)
        self.dropout = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.dropout(self.act(self.wide(x))))

    def act(self, rows: torch.Tensor) -> torch.Tensor:
        return F.gelu(rows)


class GatedMlp(nn.Module):
    """Gate, up and down of their own, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2))
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Multiplied(Mlp):
    """ST-MoE: GEGLU with a learned multiplicative bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(HIDDEN, 2 * INTERMEDIATE)
        self.mult = nn.Parameter(torch.randn(INTERMEDIATE))

    def act(self, rows: torch.Tensor) -> torch.Tensor:
        x, gate = rows.chunk(2, dim=-1)
        return F.gelu(gate) * x * self.mult


class Swish(Mlp):
    """A learned slope inside of the activation, halves taken by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(HIDDEN, 2 * INTERMEDIATE)
        self.slope = nn.Parameter(torch.randn(INTERMEDIATE))

    def act(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows[..., :INTERMEDIATE], rows[..., INTERMEDIATE:]
        return gate * torch.sigmoid(self.slope * gate) * up.clamp(-2, 2)


class InputMajor(nn.Module):
    """Matrices of its own [inputs, outputs], squared relu."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(HIDDEN, INTERMEDIATE) / 4)
        self.w2 = nn.Parameter(torch.randn(INTERMEDIATE, HIDDEN) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.w1).pow(2) @ self.w2


KINDS = (Mlp, GatedMlp, Multiplied, Swish, InputMajor)


class Apart(Dispatched):
    """Experts from a list, zipped with their buffers and stacked."""

    def __init__(self, kind: type[nn.Module] = Mlp, capacity: int = 2) -> None:
        super().__init__(capacity)
        del self.wi, self.wo
        self.mlps = nn.ModuleList(kind() for _ in range(EXPERTS))
        self.eval()

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([mlp(part) for mlp, part in zip(self.mlps, slots, strict=True)])


class Chunked(Apart):
    """DeepSpeed: chunks of one expert each, concatenated."""

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        parts = slots.chunk(EXPERTS, dim=0)
        return torch.cat([mlp(part) for mlp, part in zip(self.mlps, parts, strict=True)], dim=0)


class Indexed(Apart):
    """Buffers [C, E, H], indexed and selected in the middle."""

    def scatter(self, dispatch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tec,th->ceh", dispatch.to(x.dtype), x)

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([mlp(slots[:, e]) for e, mlp in enumerate(self.mlps)], dim=1)

    def gather(self, combine: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tec,ceh->th", combine, terms)


class Unbound(Apart):
    """Buffers in one row of slots, taken apart by size; results in a tuple."""

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        rows = slots.reshape(-1, HIDDEN).split(self.capacity)
        terms = tuple(mlp(part) for mlp, part in zip(self.mlps, rows, strict=True))
        return torch.cat(terms).view(EXPERTS, self.capacity, HIDDEN)


class Selected(Apart):
    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([mlp(slots.select(0, e)) for e, mlp in enumerate(self.mlps)])


SPELLINGS = (Apart, Chunked, Indexed, Unbound, Selected)


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


class ApartTwoChoices(TwoChoices, Apart):
    """Two choices a token, experts from a list."""

    experts = Apart.experts


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


# Look-alikes


class SoftApart(Apart):
    """A soft mixture: every slot of every expert is a mixture of all tokens."""

    def __init__(self, kind: type[nn.Module] = Mlp, capacity: int = 2) -> None:
        super().__init__(kind, capacity)
        self.slots = nn.Parameter(torch.randn(HIDDEN, EXPERTS, capacity))

    def route(self, x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        scores = torch.einsum("th,hec->tec", x, self.slots)
        return scores.softmax(0), scores.flatten(1).softmax(-1).view_as(scores)


class OfSeveralShapes(Apart):
    def __init__(self) -> None:
        super().__init__()
        self.mlps[1] = Mlp(2 * INTERMEDIATE).eval()


class WithOneTwice(Apart):
    def __init__(self) -> None:
        super().__init__()
        self.mlps[3] = self.mlps[0]


class WithOneOther(Apart):
    def __init__(self) -> None:
        super().__init__()
        self.mlps[2].act = F.relu


class WithOtherNumbers(Apart):
    def __init__(self) -> None:
        super().__init__()
        for number, mlp in enumerate(self.mlps):
            mlp.act = lambda rows, most=float(number): rows.clamp(max=most)


class OfSharedScale(Apart):
    """All experts multiply by one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(INTERMEDIATE))
        for mlp in self.mlps:
            mlp.act = lambda rows: F.gelu(rows) * self.scale


class InOtherOrder(Apart):
    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([mlp(slots[EXPERTS - 1 - e]) for e, mlp in enumerate(self.mlps)])


class OnUnevenParts(Apart):
    """The first has as many slots as all have on average."""

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        parts = slots.flatten(0, 1).split([2, 1, 3, 2])
        terms = [mlp(part) for mlp, part in zip(self.mlps, parts, strict=True)]
        return torch.cat(terms).view_as(slots)


class OnOneBuffer(Apart):
    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([mlp(slots[0]) for mlp in self.mlps])


class Mixing(Apart):
    """Experts whose tokens see each other."""

    def __init__(self) -> None:
        super().__init__()
        for mlp in self.mlps:
            mlp.act = lambda rows: rows.softmax(0)


class InPlace(Apart):
    def __init__(self) -> None:
        super().__init__()
        for mlp in self.mlps:
            mlp.act = lambda rows: F.relu(rows, inplace=True)


class Halves(Apart):
    """Each expert has half of the features; one product."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))


class Computed(Apart):
    """Weights that are computed anew in every call."""

    def experts(self, slots: torch.Tensor) -> torch.Tensor:
        terms = [F.linear(slots[e], 2 * mlp.wide.weight).relu() for e, mlp in enumerate(self.mlps)]
        return torch.stack(
            [F.linear(x, one.narrow.weight) for x, one in zip(terms, self.mlps, strict=True)]
        )


REFUSED: dict[type[Apart], str] = {
    OfSeveralShapes: "parameters of several shapes",
    WithOneTwice: "share",
    WithOneOther: "do not all compute the same",
    WithOtherNumbers: "compute with other numbers",
    OfSharedScale: "share",
    InOtherOrder: "one by one",
    OnUnevenParts: "one by one",
    OnOneBuffer: "one by one",
    Mixing: "call softmax",
    InPlace: "writes in place",
    Halves: "no two products",
    Computed: "one by one",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_alike_is_left_alone_and_says_so(kind: type[Apart]) -> None:
    model = kind()
    gm = capture(model, tokens()).gm
    before = str(gm.graph)
    result = run(Program(gm=gm), Options(kernels="torch"))
    assert str(gm.graph) == before
    assert result.program.blocks == ()
    assert any(REFUSED[kind] in miss.why for miss in result.misses), result.misses


def test_a_soft_mixture_of_modules_is_not_even_looked_at() -> None:
    model = SoftApart()
    places = [one.data_ptr() for one in model.parameters()]
    compiled = rewritten(model)
    assert compiled.error(tokens()) == 0
    assert compiled.blocks == [0]
    assert compiled.results[0].misses == ()
    assert [one.data_ptr() for one in model.parameters()] == places


def test_what_is_put_together_and_projected_is_no_near_miss() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(Mlp() for _ in range(3))
            self.out = nn.Parameter(torch.randn(3 * HIDDEN, INTERMEDIATE))
            self.back = nn.Parameter(torch.randn(INTERMEDIATE, HIDDEN))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([head(x) for head in self.heads], -1) @ self.out @ self.back

    result = run(Program(gm=capture(Heads().eval(), tokens()).gm), Options(strict=True))
    assert result.program.blocks == ()
    assert result.misses == ()


def test_a_result_of_one_expert_that_is_used_elsewhere_keeps_all_of_them() -> None:
    class Watched(Apart):
        def forward(self, x: torch.Tensor) -> Any:
            dispatch, combine = self.route(x, self.router(x).softmax(-1))
            terms = [
                mlp(part) for mlp, part in zip(self.mlps, self.scatter(dispatch, x), strict=True)
            ]
            return self.gather(combine, torch.stack(terms)), terms[0].norm()

    gm = capture(Watched(), tokens()).gm
    before = str(gm.graph)
    result = run(Program(gm=gm), Options())
    assert str(gm.graph) == before
    assert any("is used by" in miss.why for miss in result.misses)


def test_gradients_leave_the_graph_as_it_was() -> None:
    gm = capture(Apart(), tokens()).gm
    before = str(gm.graph)
    result = run(Program(gm=gm, trains=True), Options())
    assert str(gm.graph) == before
    assert any("gradients are wanted" in miss.why for miss in result.misses)

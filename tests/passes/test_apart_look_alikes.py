"""What looks like experts that are called one by one, and is not: left as it is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import run
from tests.models import EXPERTS, HIDDEN, INTERMEDIATE, capture
from tests.passes.apart import (
    Apart,
    Mlp,
)
from tests.passes.dispatched import Tensors
from tests.passes.rewriting import rewritten, tokens


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

"""Blocks whose two products store their weights in different layouts, in every style."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models import BatchedMoe, GroupedMoe, Router
from tests.passes.hand_written import WIDTH, E, H, check_left_alone, check_raised

LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]
IDS = ["both output-major", "down input-major", "gate and up input-major", "both input-major"]
MIXED = LAYOUTS[1:3]

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
each_mixed = pytest.mark.parametrize("layout", MIXED, ids=IDS[1:3])


class Gathered(nn.Module):
    """Matrices gathered for every choice of a token; w1 and w3 lie alike, w2 as it likes."""

    def __init__(self, layout: tuple[bool, bool], inner: int = WIDTH) -> None:
        super().__init__()
        self.pick = Router(experts=E)
        self.turned, self.down_turned = layout
        shape = (E, H, inner) if self.turned else (E, inner, H)
        self.w1, self.w3 = (nn.Parameter(torch.randn(shape) / 3) for _ in range(2))
        self.w2 = nn.Parameter(
            torch.randn((E, inner, H) if self.down_turned else (E, H, inner)) / 3
        )

    def first(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ti,taio->tao" if self.turned else "ti,taoi->tao", x, weight)

    def second(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tao,taoi->tai" if self.down_turned else "tao,taio->tai", rows, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        rows = F.silu(self.first(x, self.w1[ids])) * self.first(x, self.w3[ids])
        return torch.einsum("tai,ta->ti", self.second(rows, self.w2[ids]), weights)


class Gates(Gathered):
    """All experts on all tokens, weighted by gates that are zero but for the chosen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        gates = torch.zeros(x.shape[0], E, dtype=weights.dtype).scatter(1, ids, weights)
        first = "th,ehi->tei" if self.turned else "th,eih->tei"
        rows = F.silu(torch.einsum(first, x, self.w1)) * torch.einsum(first, x, self.w3)
        second = "tei,eih->teh" if self.down_turned else "tei,ehi->teh"
        return torch.einsum("teh,te->th", torch.einsum(second, rows, self.w2), gates)


class Canonical(Gathered):
    """As our own capture writes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        linear = torch.ops.moecc.expert_linear
        gate = linear(x, ids, self.w1, None, self.turned)
        rows = F.silu(gate) * linear(x, ids, self.w3, None, self.turned)
        terms = linear(rows, ids, self.w2, None, self.down_turned)
        return torch.ops.moecc.combine(terms, weights).to(x.dtype)


class Grouped(GroupedMoe):
    """`grouped_mm` of [E, outputs, inputs] turned around, or of [E, inputs, outputs] as it is."""

    def __init__(self, layout: tuple[bool, bool]) -> None:
        super().__init__()
        self.turned, self.down_turned = layout
        if self.turned:
            self.up = nn.Parameter(self.up.detach().mT.contiguous())
        if self.down_turned:
            self.low = nn.Parameter(self.low.detach().mT.contiguous())

    def product(self, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        turned = self.turned if weight is self.up else self.down_turned
        return torch._grouped_mm(x, weight if turned else weight.transpose(-2, -1), offs=offsets)


class Batched(Grouped, BatchedMoe):
    """`batched_mm`, with the weights on either side."""

    def bmm(self, x: torch.Tensor, weight: torch.Tensor, turned: bool) -> torch.Tensor:
        if turned:
            return torch.bmm(x.unsqueeze(1), weight).squeeze(1)
        return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        flat = ids.reshape(-1)
        rows = self.bmm(x.repeat_interleave(2, dim=0), self.up[flat], self.turned)
        terms = self.bmm(self.activate(rows), self.low[flat], self.down_turned)
        terms = terms * weights.reshape(-1).unsqueeze(-1)
        return terms.view(x.shape[0], 2, x.shape[-1]).sum(dim=1)


@each_layout
@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize(
    ("model", "style"), [(Gathered, "gathered"), (Gates, "dense_gates"), (Canonical, "canonical")]
)
def test_each_product_keeps_its_layout(
    model: type[Gathered], style: str, kernels: str, layout: tuple[bool, bool]
) -> None:
    block = check_raised(model(layout), style, kernels=kernels)
    assert (block.transposed, block.down_transposed) == layout
    assert block.up is not None
    assert (block.hidden_size, block.intermediate) == (H, WIDTH)


@each_layout
@pytest.mark.parametrize(
    ("model", "style"),
    [(Grouped, "grouped_mm"), (Batched, "batched_mm")],
    ids=["grouped", "batched"],
)
def test_each_product_of_a_pattern_keeps_its_layout(
    model: type[Grouped], style: str, layout: tuple[bool, bool]
) -> None:
    block = check_raised(model(layout), style, dtype=torch.bfloat16)
    assert (block.transposed, block.down_transposed) == layout


@each_layout
@pytest.mark.parametrize("model", [Gathered, Gates, Canonical])
def test_square_matrices_are_read_in_the_layout_that_the_graph_says(
    model: type[Gathered], layout: tuple[bool, bool]
) -> None:
    """No shape tells the layouts apart where H = WIDTH: the axes of the products must."""
    style = {Gathered: "gathered", Gates: "dense_gates", Canonical: "canonical"}[model]
    block = check_raised(model(layout, inner=H), style, kernels="native")
    assert (block.transposed, block.down_transposed) == layout


@each_mixed
def test_one_tensor_may_be_both_products(layout: tuple[bool, bool]) -> None:
    """Experts that come back by the matrices they went by: only in two layouts is that one."""
    model = Gathered(layout)
    model.w2 = model.w1
    block = check_raised(model, "gathered", kernels="native")
    assert block.gate_up == block.down


class UpTurned(Gathered):
    """Gate and up in different layouts, which a kernel would have to read in two ways."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        up = torch.einsum("ti,taio->tao", x, self.w3.view(E, H, WIDTH)[ids])
        rows = F.silu(self.first(x, self.w1[ids])) * up
        return torch.einsum("tai,ta->ti", self.second(rows, self.w2[ids]), weights)


class UpTurnedCanonical(Canonical):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        linear = torch.ops.moecc.expert_linear
        up = linear(x, ids, self.w3.view(E, H, WIDTH), None, True)
        rows = F.silu(linear(x, ids, self.w1, None, self.turned)) * up
        terms = linear(rows, ids, self.w2, None, self.down_turned)
        return torch.ops.moecc.combine(terms, weights).to(x.dtype)


@pytest.mark.parametrize("model", [UpTurned, UpTurnedCanonical])
@pytest.mark.parametrize("down_turned", [False, True])
def test_gate_and_up_have_to_lie_alike(model: type[Gathered], down_turned: bool) -> None:
    assert "different layouts" in check_left_alone(model((False, down_turned)))


class WrongWay(Canonical):
    """Square matrices of the second product, multiplied the other way than the flag would."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.pick(x)
        linear = torch.ops.moecc.expert_linear
        gate = linear(x, ids, self.w1, None, self.turned)
        rows = F.silu(gate) * linear(x, ids, self.w3, None, self.turned)
        terms = linear(rows, ids, self.w2.mT, None, not self.down_turned)
        return torch.ops.moecc.combine(terms, weights).to(x.dtype)


@each_mixed
def test_a_view_turned_around_is_not_read_as_if_it_were_stored_so(
    layout: tuple[bool, bool],
) -> None:
    assert "contiguous" in check_left_alone(WrongWay(layout))

"""Loops over stacked parameters whose two products lie in different layouts, as DBRX keeps them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moecc
from moecc import capture
from moecc.passes.options import Options
from tests.models import relative_error

H, I, E, K = 16, 12, 6, 2  # noqa: E741
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]
IDS = ["both output-major", "down input-major", "gate and up input-major", "both input-major"]
SIZES = ((2, 9), (3, 5), (4, 33), (1, 1))

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
each_mixed = pytest.mark.parametrize("layout", LAYOUTS[1:3], ids=IDS[1:3])
square = pytest.mark.parametrize("inner", [I, H], ids=["I < H", "I = H"])


class Loop(nn.Module):
    """A loop over the experts that were hit, each a slice of three parameters."""

    def __init__(self, layout: tuple[bool, bool], inner: int = I) -> None:
        super().__init__()
        self.score = nn.Linear(H, E, bias=False)
        self.turned, self.down_turned, self.inner = *layout, inner
        first = (E, H, inner) if self.turned else (E, inner, H)
        self.w1, self.v1 = (nn.Parameter(torch.randn(first) / 4) for _ in range(2))
        second = (E, inner, H) if self.down_turned else (E, H, inner)
        self.w2 = nn.Parameter(torch.randn(second) / 4)

    def matrices(self, number: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.w1[number], self.v1[number], self.w2[number]

    def expert(self, x: torch.Tensor, number: Any) -> torch.Tensor:
        gate, up, down = self.matrices(number)
        if not self.turned:
            gate, up = gate.T, up.T
        rows = F.silu(x.matmul(gate)) * x.matmul(up)
        return rows.matmul(down if self.down_turned else down.T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, H)
        weights, ids = self.score(flat).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(flat)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for number in mask.sum(dim=(-1, -2)).gt(0).nonzero():
            slot, token = torch.where(mask[number[0]])
            rows = self.expert(flat[token], number[0])
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out.view(x.shape)


class Dbrx(Loop):
    """Two dimensions, [E * I, H] each, of which experts are rows."""

    def __init__(self, inner: int = I) -> None:
        super().__init__((False, True), inner)
        for name in ("w1", "v1", "w2"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach().flatten(0, 1)))

    def matrices(self, number: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        w1, v1, w2 = (one.view(E, self.inner, H)[number] for one in (self.w1, self.v1, self.w2))
        return w1, v1, w2


def check(model: Loop, layout: tuple[bool, bool]) -> None:
    """Hold that both roads run one kernel in the model's layouts and compute what the loop does."""
    model = model.eval()
    batches = [torch.randn(*size, H) for size in SIZES]
    with torch.no_grad():
        expected = [model(x) for x in batches]
        run = torch.compile(model, backend="moecc", fullgraph=True, options={"inner": "eager"})
        for x, wanted in zip(batches, expected, strict=True):
            assert relative_error(run(x), wanted) < 1e-5
            assert relative_error(model(x), wanted) < 1e-5
    report = moecc.report(model)
    assert not [miss for graph in report.graphs for miss in graph.misses]
    assert report.eager is not None
    assert (report.eager.calls, report.eager.own_calls) == (len(SIZES), 0)
    (kernel,) = report.eager.kernels
    assert {block["kernel"] for graph in report.graphs for block in graph.blocks} == {kernel}
    flags = tuple(name in kernel.split() for name in ("transposed", "down_transposed", "split"))
    assert flags == (*layout, True)


@square
@each_layout
def test_each_product_keeps_its_layout(layout: tuple[bool, bool], inner: int) -> None:
    check(Loop(layout, inner), layout)


@square
def test_dbrx_is_read_where_it_lies(inner: int) -> None:
    model = Dbrx(inner)
    memory = {name: one.data_ptr() for name, one in model.named_parameters()}
    check(model, (False, True))
    assert {name: one.data_ptr() for name, one in model.named_parameters()} == memory


@each_mixed
def test_one_parameter_may_be_both_products(layout: tuple[bool, bool]) -> None:
    """Experts that come back by the matrices they went by: only in two layouts is that one."""
    model = Loop(layout)
    model.w2 = model.w1
    check(model, layout)


class UpTurned(Loop):
    """Gate and up in different layouts, which a kernel would have to read in two ways."""

    def __init__(self, layout: tuple[bool, bool], inner: int) -> None:
        super().__init__(layout, inner)
        self.v1 = nn.Parameter(self.v1.detach().mT.contiguous())

    def expert(self, x: torch.Tensor, number: Any) -> torch.Tensor:
        gate, up, down = self.matrices(number)
        rows = F.silu(x.matmul(gate.T)) * x.matmul(up)
        return rows.matmul(down if self.down_turned else down.T)


@square
@pytest.mark.parametrize("down_turned", [False, True])
def test_gate_and_up_have_to_lie_alike(down_turned: bool, inner: int) -> None:
    model = UpTurned((False, down_turned), inner).eval()
    x = torch.randn(2, 9, H)
    with torch.no_grad():
        expected = model(x)
        capture.adopt(model, Options())
        assert torch.equal(model(x), expected)
    assert moecc.report(model).eager is None
    assert "its experts stay a loop" in capture.take_notes()[-1].why

"""Which index of an input an index of a result reads, whatever lies between."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import Node

from moecc.passes.axes import (
    Axis,
    View,
    contracted,
    deal,
    leaves,
    letters,
    over_own_axes,
    through_layout,
)
from moecc.passes.sizes import expression
from tests.models import capture

Layout = Callable[[torch.Tensor], torch.Tensor]


class Wrapped(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(*tensors)


def result_of(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Node:
    graph = capture(Wrapped(function), *tensors).gm.graph
    (result,) = next(node for node in graph.nodes if node.op == "output").args[0]
    return result


def source_of(view: View) -> View:
    while (below := through_layout(view)) is not None:
        view = below
    return view


def places(view: View, dims: tuple[tuple[Axis, ...], ...]) -> list[list[int]]:
    """Say of each dimension which of some axes run along it."""
    order = [axis for dim in dims for axis in leaves(dim)]
    return [[order.index(axis) for axis in leaves(dim)] for dim in view.dims]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (lambda x: x.permute(2, 0, 1), [[1], [2], [0]]),
        (lambda x: x.transpose(-1, 0).contiguous(), [[2], [1], [0]]),
        (lambda x: x.mT.float(), [[0], [2], [1]]),
        (lambda x: x.unsqueeze(1)[..., None].squeeze(-1), [[0], [1], [2]]),
        (lambda x: x.reshape(6, 4).view(2, 3, 4), [[0], [1], [2]]),
        (lambda x: x.reshape(6, 4).t(), [[1], [2], [0]]),
        (lambda x: x.flatten(), [[0], [1], [2]]),
        (lambda x: x.reshape(2, 12).unflatten(1, (3, 4)), [[0], [1], [2]]),
        (lambda x: x[:, :, None].expand(2, 3, 5, 4), [[0], [1], [3]]),
    ],
)
def test_layout_keeps_axes(layout: Layout, expected: list[list[int]]) -> None:
    view = over_own_axes(result_of(layout, torch.randn(2, 3, 4)))
    source = source_of(view)
    assert source.node.op == "placeholder"
    assert places(source, view.dims) == expected


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.reshape(3, 2, 4),
        lambda x: x.flip(0),
        lambda x: x[:, :2],
        lambda x: x.roll(1, 0),
        lambda x: x.int(),
    ],
)
def test_what_moves_or_changes_values_is_no_layout(layout: Layout) -> None:
    view = over_own_axes(result_of(layout, torch.randn(2, 3, 4)))
    assert source_of(view).node.op != "placeholder"


def test_dimensions_of_the_same_size_are_told_apart() -> None:
    view = over_own_axes(result_of(lambda x: x.t().reshape(9).view(3, 3), torch.randn(3, 3)))
    assert places(source_of(view), view.dims) == [[1], [0]]


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.matmul, ((2, 5, 3), (3, 4)), ([[0], [1], [3]], [[3], [2]])),
        (torch.bmm, ((2, 5, 3), (2, 3, 4)), ([[0], [1], [3]], [[0], [3], [2]])),
        (
            lambda a, b: torch.einsum("x y z, z w -> w x y", a, b),
            ((2, 5, 3), (3, 4)),
            ([[1], [2], [3]], [[3], [0]]),
        ),
        (
            lambda a, b: torch.einsum("...nd,...dh->...nh", a, b),
            ((2, 5, 3), (2, 3, 4)),
            ([[0], [1], [3]], [[0], [3], [2]]),
        ),
    ],
)
def test_a_product_sums_over_an_axis_that_both_operands_have(
    function: Callable[..., torch.Tensor],
    shapes: tuple[tuple[int, ...], ...],
    expected: tuple[list[list[int]], ...],
) -> None:
    view = over_own_axes(result_of(function, *(torch.randn(*shape) for shape in shapes)))
    operands = contracted(view, {})
    assert operands is not None
    (summed,) = (operands[0].axes & operands[1].axes) - view.axes
    assert tuple(places(one, (*view.dims, (summed,))) for one in operands) == expected


def test_reading_a_product_again_gives_the_same_axes() -> None:
    view = over_own_axes(result_of(torch.mm, torch.randn(2, 3), torch.randn(3, 4)))
    bound: dict[tuple[object, ...], Axis] = {}
    assert contracted(view, bound) == contracted(view, bound)


def test_an_axis_that_was_split_stays_split_for_everybody() -> None:
    whole = Axis(expression(12))
    first = deal([whole], [expression(3), expression(4)])
    second = deal(leaves([whole]), [expression(3), expression(4)])
    assert first == second == tuple((part,) for part in whole.parts)
    assert deal(leaves([whole]), [expression(4), expression(3)]) is None


@pytest.mark.parametrize("equation", ["ii->i", "ab,bc", "ab,bc->ad", "abc,bc->a"])
def test_equations_that_are_not_plain_are_not_read(equation: str) -> None:
    assert letters(equation, [2, 2]) is None

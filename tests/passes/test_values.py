"""What a node of a graph that is not functional holds, for who reads it where."""

from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule, Node

from moecc.passes.router.values import Unreadable, Values, plain_name
from tests.models import capture


class Writes(torch.nn.Module):
    def __init__(self, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(x * 2)


def last(how: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Values, Node, GraphModule]:
    """Give the node that the graph returns."""
    gm = capture(Writes(how), torch.randn(4, 4)).gm
    (result,) = gm.graph.output_node().args[0]
    return Values(gm.graph), result, gm


def whole(y: torch.Tensor) -> torch.Tensor:
    y.mul_(3)
    y.add_(1)
    return y.exp()


def item(y: torch.Tensor) -> torch.Tensor:
    y[0] = 1.0
    return y.exp()


def operators(y: torch.Tensor) -> torch.Tensor:
    z = y
    z += 1
    z /= 2
    return y.exp()


def before_a_write(y: torch.Tensor) -> torch.Tensor:
    z = y.exp()
    y.mul_(3)
    return z


@pytest.mark.parametrize(
    ("how", "name"),
    [(whole, "add_"), (item, "setitem"), (operators, "itruediv"), (before_a_write, "mul")],
)
def test_follows_writes_to_the_whole_tensor(
    how: Callable[[torch.Tensor], torch.Tensor], name: str
) -> None:
    values, result, _ = last(how)
    written = values.operand(result, 0)
    assert plain_name(written) == name.removesuffix("_").replace("itruediv", "div")


def diagonal(y: torch.Tensor) -> torch.Tensor:
    y.diagonal().add_(1)
    return y.exp()


def half(y: torch.Tensor) -> torch.Tensor:
    _, right = y.chunk(2, dim=-1)
    right.mul_(3)
    return y.exp()


def same_dtype(y: torch.Tensor) -> torch.Tensor:
    y.float().view(-1).add_(1)
    return y.exp()


def through_out(y: torch.Tensor) -> torch.Tensor:
    torch.add(torch.ones(4, 4), 1, out=y)
    return y.exp()


@pytest.mark.parametrize("how", [diagonal, half, same_dtype, through_out])
def test_a_write_through_another_name_is_not_read(
    how: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    values, result, _ = last(how)
    with pytest.raises(Unreadable):
        values.operand(result, 0)


def a_copy(y: torch.Tensor) -> torch.Tensor:
    y.double().add_(1)
    y.clone().mul_(2)
    return y.exp()


def test_a_write_to_a_copy_changes_nothing() -> None:
    values, result, _ = last(a_copy)
    assert plain_name(values.operand(result, 0)) == "mul"
    assert values.operand(result, 0).args[1] == 2


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (lambda y: y.double().unsqueeze(0).detach(), "mul"),
        (lambda y: y.view(2, 2, 4).squeeze(0), "mul"),
        (lambda y: y.argmax(-1).unsqueeze(-1).to(torch.int32), "argmax"),
        (lambda y: y.argmax(-1).to(torch.int8), "to"),
        (lambda y: y.to(torch.int64), "to"),
        (lambda y: (y > 1).float(), "float"),
        (lambda y: y.argmax(-1).bool(), "bool"),
        (lambda y: y.t(), "t"),
        (lambda y: y.view(-1, 2), "view"),
        (lambda y: torch.nn.functional.dropout(y, 0.5, training=False), "mul"),
        (lambda y: torch.nn.functional.dropout(y, 0.5), "dropout"),
    ],
)
def test_goes_back_only_through_what_changes_no_number(
    how: Callable[[torch.Tensor], torch.Tensor], name: str
) -> None:
    values, result, _ = last(how)
    assert plain_name(values.plain(result)) == name

"""Values are read as products of factors over axes, and back to how they were arranged."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from moecc.passes.axes import leaves
from moecc.passes.products.choice import chosen_from
from moecc.passes.products.contraction import Reading
from moecc.passes.products.gates import read_sparse
from moecc.passes.router.values import Values
from tests.models import capture

Function = Callable[..., torch.Tensor]
T, K, H, E = 6, 2, 4, 5


class Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def result_of(function: Function, *inputs: torch.Tensor) -> Node:
    """Give the node of a function's result as Dynamo captures it."""
    return capture(Module(function), *inputs).gm.graph.output_node().args[0][0]


def read(node: Node, count: int) -> set[tuple[tuple[str, str], ...]]:
    """Write every reading as einsum would: the output's letters first, each factor's after it."""
    readings: set[tuple[tuple[str, str], ...]] = set()
    reading = Reading()
    root = reading.start(node)
    for cut in reading.cuts(root, count):
        names = {axis: "abcdefg"[place] for place, axis in enumerate(root.flat)}
        factors: list[tuple[str, str]] = []
        for chain in cut:
            for axis in leaves(a for dim in chain[-1].view.dims for a in dim):
                names.setdefault(axis, "stuvwxyz"[len(names) - len(root.flat)])
            letters = (names[axis] for axis in chain[-1].flat)
            factors.append((chain[-1].node.name, "".join(letters)))
        readings.add(tuple(factors))
    return readings


Y, W = torch.randn(T, K, H), torch.rand(T, K)

WEIGHTED_SUMS: dict[str, Function] = {
    "einsum": lambda y, w: torch.einsum("tai,ta->ti", y, w),
    "spaces and an ellipsis": lambda y, w: torch.einsum(" ...k i, ...k -> ...i ", y, w),
    "mul and sum": lambda y, w: (y * w.unsqueeze(-1)).sum(1),
    "keepdim": lambda y, w: (y * w[..., None]).sum(-2, keepdim=True).squeeze(1),
    "matmul": lambda y, w: (w.unsqueeze(1) @ y).squeeze(1),
    "bmm": lambda y, w: torch.bmm(y.transpose(1, 2), w.unsqueeze(2)).squeeze(2),
    "flattened": lambda y, w: (y.view(-1, H) * w.reshape(-1, 1)).view(-1, K, H).sum(dim=1),
    "expanded": lambda y, w: (y * w.unsqueeze(-1).expand_as(y)).sum([1]),
    "permuted": lambda y, w: (y.permute(1, 0, 2) * w.t().unsqueeze(-1)).sum(0),
}


@pytest.mark.parametrize("name", WEIGHTED_SUMS)
def test_one_sum_is_read_alike_in_every_spelling(name: str) -> None:
    node = result_of(WEIGHTED_SUMS[name], Y, W)
    assert {frozenset(reading) for reading in read(node, 2)} == {
        frozenset({("l_inputs_0_", "asb"), ("l_inputs_1_", "as")})
    }


@pytest.mark.parametrize(
    "function",
    [
        lambda y, w: (y * w.unsqueeze(-1)).mean(1),
        lambda y, w: (y * w.unsqueeze(-1)).amax(1),
        lambda y, w: (y + w.unsqueeze(-1)).sum(1),
        lambda y, w: torch.einsum("tai,ta->ti", y, w).cumsum(0),
        lambda y, w: torch.einsum("ttai->ai", (y * w.unsqueeze(-1)).expand(T, T, K, H)),
    ],
)
def test_what_is_no_sum_of_products_is_not_read_as_one(function: Function) -> None:
    assert not read(result_of(function, Y, W), 2)


def test_rows_that_are_sorted_and_brought_back_are_where_they_were() -> None:
    def function(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        order = ids.view(-1).argsort()
        return x[order // K][order.argsort()].view(-1, K, H)

    node = result_of(function, torch.randn(T, H), torch.randint(E, (T, K)))
    reading = Reading()
    root = reading.start(node)
    last = reading.chain(root)[-1]
    tokens, _, features = root.view.dims
    assert (last.node.name, last.flat) == ("l_inputs_0_", leaves((*tokens, *features)))


def test_rows_in_another_order_stay_unread() -> None:
    def function(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        order = ids.view(-1).argsort()
        return x[order // K][order].view(-1, K, H)

    node = result_of(function, torch.randn(T, H), torch.randint(E, (T, K)))
    reading = Reading()
    assert reading.chain(reading.start(node))[-1].node.name != "l_inputs_0_"


LOGITS = torch.randn(T, E)


def is_sparse(function: Function) -> bool:
    """Tell whether a function's result is known to be zero but for the ids of a top-k."""
    node = result_of(function, LOGITS)
    values = Values(node.graph)
    found = read_sparse(values, node)
    return found is not None and found.fill == 0 and chosen_from(values, found.ids) == E


def top(logits: torch.Tensor) -> torch.Tensor:
    return logits.topk(K, -1)[1]


@pytest.mark.parametrize(
    "function",
    [
        lambda p: torch.zeros_like(p).scatter(1, top(p), 1.0),
        lambda p: p.sigmoid() * F.one_hot(top(p), E).sum(1),
        lambda p: p.masked_fill(F.one_hot(top(p), E).sum(1) == 0, 0.0),
        lambda p: torch.where(F.one_hot(top(p), E).sum(1).bool(), p, 0.0),
        lambda p: p.masked_fill(~torch.zeros(T, E).scatter(1, top(p), 1).bool(), -torch.inf).exp(),
    ],
)
def test_gates_are_sparse_by_the_ids_that_made_them(function: Function) -> None:
    assert is_sparse(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda p: torch.ones_like(p).scatter(1, top(p), 0.0),
        lambda p: torch.zeros_like(p).scatter(0, top(p), 1.0),
        lambda p: p.masked_fill(F.one_hot(top(p), E).sum(1) > 0, 0.0),
        lambda p: torch.where(F.one_hot(top(p), E).sum(1).bool(), p, p * 0.5),
        lambda p: torch.zeros_like(p).scatter(1, top(p), 1.0).softmax(-1),
        lambda p: torch.zeros_like(p).scatter(1, top(p), 1.0).cumsum(1),
        lambda p: torch.zeros_like(p).scatter(1, top(p), 1.0).roll(1, 1),
        lambda p: torch.zeros_like(p).scatter(1, top(p), 1.0).view(E, T).t(),
        lambda p: torch.full_like(p, -torch.inf).scatter(1, top(p), 0)[..., None].softmax(-1),
        lambda p: 1 / torch.zeros_like(p).scatter(1, top(p), 1.0),
    ],
)
def test_gates_that_may_be_anything_elsewhere_are_not_sparse(function: Function) -> None:
    assert not is_sparse(function)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda p: p.topk(K, -1)[1], E),
        (lambda p: torch.topk(p, K, dim=1).indices.long(), E),
        (lambda p: p.argsort(-1, descending=True)[:, :K], E),
        (lambda p: p.sort(dim=-1)[1][..., -K:], E),
        (lambda p: p.argmax(-1), E),
        (lambda p: p.max(-1)[1], E),
        (lambda p: p.topk(K, 0)[1], None),
        (lambda p: p.topk(K, -1)[1] // 2, None),
        (lambda p: p.argsort(0)[:, :K], None),
        (lambda p: p.argmax(0), None),
        (lambda p: p.long(), None),
    ],
)
def test_knows_which_ids_of_a_row_all_differ(function: Function, count: int | None) -> None:
    node = result_of(function, LOGITS)
    assert chosen_from(Values(node.graph), node) == count

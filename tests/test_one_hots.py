"""One-hot encodings that size themselves by values are traced in one graph, and only by us."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moecc import one_hots
from moecc.capture import release
from tests.models import relative_error

INDEX = torch.tensor([[0, 3, 7, 2], [1, 1, 9, 4]])


def cut_off(index: torch.Tensor, classes: int) -> torch.Tensor:
    top = index.max() + 1
    return F.one_hot(index, max(top + 1, classes))[..., :classes]


def as_many_as_needed(index: torch.Tensor, classes: int) -> torch.Tensor:
    return F.one_hot(index, max(int(index.max()) + 1, classes))


def cut_off_at_the_front(index: torch.Tensor, classes: int) -> torch.Tensor:
    return F.one_hot(index, max(index.max() + 1, classes))[..., -classes:]


def of_the_next(index: torch.Tensor, classes: int) -> torch.Tensor:
    return F.one_hot(index + 1, max(index.max() + 2, classes))[..., :classes]


def one_less(index: torch.Tensor, classes: int) -> torch.Tensor:
    return F.one_hot(index, max(index.max() + 1, classes))[..., : classes - 1]


def none_if_one_is_beyond(index: torch.Tensor, classes: int) -> torch.Tensor:
    if index.max() >= classes:
        index = torch.zeros_like(index)
    return F.one_hot(index, max(index.max() + 1, classes))[..., :classes]


OTHERS = (
    "as_many_as_needed", "cut_off_at_the_front", "of_the_next", "one_less", "none_if_one_is_beyond"
)  # fmt: skip


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return cut_off(index, 6).float() @ self.weight


class Inherited(Places):
    """Has no forward of its own."""


class Strangers(nn.Module):
    """Calls everything that is not what it looks like."""

    def forward(self, index: torch.Tensor) -> list[torch.Tensor]:
        return [
            as_many_as_needed(index, 6),
            cut_off_at_the_front(index, 6),
            of_the_next(index, 6),
            one_less(index, 6),
            none_if_one_is_beyond(index, 6),
        ]


@pytest.fixture
def places() -> Iterator[Any]:
    model = Places()
    yield model
    release(model)


def graphs_of(model: nn.Module, backend: str, **options: Any) -> int:
    torch._dynamo.reset()
    graphs = 0

    def count(gm: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return gm

    if backend == "moecc":
        compiled = torch.compile(model, backend="moecc", fullgraph=True, options=options)
        graphs = 1
    else:
        compiled = torch.compile(model, backend=count)
    with torch.no_grad():
        for length in (4, 3, 1):
            index = INDEX[:, :length]
            assert relative_error(compiled(index), model(index)) == 0
    return graphs


def test_our_backend_traces_it_in_one_graph(places: nn.Module) -> None:
    assert graphs_of(places, "moecc", inner="eager") == 1


def test_a_forward_may_be_inherited() -> None:
    model = Inherited()
    assert graphs_of(model, "moecc", inner="eager") == 1
    release(model)


def test_other_backends_and_eager_calls_get_the_function_as_it_was(places: nn.Module) -> None:
    before = graphs_of(places, "other")
    torch.compile(places, backend="moecc")
    assert graphs_of(places, "other") == before > 1
    with pytest.raises(RuntimeError, match="non-negative"):
        places(INDEX - 5)


def test_released_models_leave_nothing_behind(places: nn.Module) -> None:
    own, other = cut_off, Places()
    torch.compile(places, backend="moecc")
    torch.compile(other, backend="moecc")
    assert cut_off is not own
    release(places)
    assert cut_off is not own, "the other model still needs it"
    release(other)
    assert cut_off is own


def test_look_alikes_keep_their_names() -> None:
    module, model = sys.modules[__name__], Strangers()
    own = [getattr(module, name) for name in OTHERS]
    one_hots.adopt(model, lambda: True)
    assert [getattr(module, name) for name in OTHERS] == own
    release(model)

"""Rules that only large batches meet are refused, however they are written."""

from collections.abc import Callable

import numpy
import pytest
import torch

from moecc.observe.counts import Count, as_counts, sized_len
from moecc.observe.unrecordable import Unrecordable
from tests.loops import Block
from tests.observe.test_observe import Loop, observe

LIMIT = 5000
"""More tokens than a block is ever observed with."""

Term = Callable[..., torch.Tensor]

CAPACITIES: dict[str, Term] = {
    "a slice": lambda y, w, *_: torch.cat([y[:LIMIT], 0 * y[LIMIT:]]) * w,
    "len": lambda y, w, *_: y * w if len(y) < LIMIT else 0 * y,
    "a shape": lambda y, w, *_: y * w if y.shape[0] < LIMIT else 0 * y,
    "min of len": lambda y, w, *_: y * w * min(len(y), LIMIT) / max(len(y), 1),
    "a mask of positions": lambda y, w, *_: y * w * (torch.arange(len(y)) < LIMIT)[:, None],
    "ranks": lambda y, w, *_: y * w * (torch.ones_like(w).cumsum(0) <= LIMIT),
    "clamped ranks": lambda y, w, *_: y * w / torch.ones_like(w).cumsum(0).clamp(min=LIMIT),
}


@pytest.mark.parametrize("name", CAPACITIES)
def test_a_capacity_that_no_observed_batch_reaches_is_refused(name: str) -> None:
    with pytest.raises(Unrecordable):
        observe(Loop(CAPACITIES[name]))


class Counted(Block):
    """Slices by counts that Python reads, and a rule about them."""

    def __init__(self, read: Callable[[torch.Tensor], list[int]], rule: Callable[[int], int]):
        super().__init__()
        self.read, self.rule = read, rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.route(x)
        order = ids.view(-1).argsort()
        token, scales = order // ids.shape[1], weights.view(-1)[order]
        out, start = torch.zeros_like(x), 0
        for number, count in enumerate(self.read(torch.bincount(ids.view(-1), minlength=6))):
            part = slice(start, start + self.rule(count))
            result = self.pool[number](x[token[part]]) * scales[part, None]
            out.index_add_(0, token[part], result)
            start += count
        return out


READ: dict[str, Callable[[torch.Tensor], list[int]]] = {
    "tolist": lambda counts: counts.tolist(),
    "numpy": lambda counts: counts.cpu().numpy(),
    "item": lambda counts: [one.item() for one in counts],
    "numpy cumulated": lambda counts: numpy.diff(counts.numpy().cumsum(), prepend=0),
}


@pytest.mark.parametrize("read", READ)
def test_counts_that_only_cut_are_followed(read: str) -> None:
    observe(Counted(READ[read], lambda count: count))


@pytest.mark.parametrize("read", READ)
def test_counts_that_python_limits_are_refused(read: str) -> None:
    with pytest.raises(Unrecordable, match="count"):
        observe(Counted(READ[read], lambda count: min(count, LIMIT)))


@pytest.mark.parametrize("read", ["tolist", "numpy"])
def test_counts_made_plain_ints_are_refused(read: str) -> None:
    with pytest.raises(Unrecordable, match="int"):
        observe(Counted(READ[read], lambda count: min(int(count), LIMIT)))


def test_a_count_may_be_asked_for_zero_and_added_up() -> None:
    first, second = as_counts([0, 5])
    assert first == 0
    assert not first > 0
    assert isinstance(first + second, Count)
    assert first < second
    with pytest.raises(Unrecordable):
        assert second < 6


def test_len_is_its_own_again() -> None:
    own = len
    with sized_len():
        assert (len([1, 2]), len(torch.ones(3))) == (2, 3)
    assert len is own

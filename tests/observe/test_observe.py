"""A module is raised only if it is a weighted sum of experts for every input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moecc.observe.block import observe_modules
from moecc.observe.expert import read_module
from moecc.observe.unrecordable import Unrecordable
from tests.loops import EXPERTS, HIDDEN, INNER, Block, Glu, Merged, plain_mlp

Term = Callable[..., torch.Tensor]


class Loop(Block):
    """A plain loop whose terms a test can change: `term(result, weight, number, x, token)`."""

    def __init__(self, term: Term) -> None:
        super().__init__()
        self.term = term

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.pool):
            token, slot = torch.where(ids == number)
            result, weight = expert(x[token]), weights[token, slot, None]
            out.index_add_(0, token, self.term(result, weight, number, x, token))
        return out


def observe(module: Any) -> None:
    module.eval()
    observe_modules(module, [*module.pool], read_module(module.pool[0]))


def test_a_plain_sum_is_raised() -> None:
    observe(Loop(lambda result, weight, *_: result * weight))


WRONG: dict[str, Term] = {
    "a threshold on weights": lambda y, w, *_: torch.where(w > 1e-3, y * w, 0 * y),
    "a threshold that Python decides": lambda y, w, *_: y * w if (w < 2).all() else y,
    "a clamp that never bites": lambda y, w, *_: y.clamp(-1e6, 1e6) * w,
    "one expert that counts twice": lambda y, w, n, *_: y * w * (2 if n == EXPERTS - 1 else 1),
    "the next token's result": lambda y, w, *_: y.roll(1, 0) * w,
    "a nonlinear sum": lambda y, w, *_: (y * w).tanh(),
    "an expert that is scaled by the tokens": lambda y, w, n, x, t: y * w * x[t],
    "a capacity in Python": lambda y, w, *_: y * w if len(y) < 9 else 0 * y,
    "a size that decides": lambda y, w, n, x, t: y * w * (1 if x.shape[0] < 1000 else 2),
    "weights squared": lambda y, w, *_: y * w * w,
}


@pytest.mark.parametrize("name", WRONG)
def test_look_alikes_are_refused(name: str) -> None:
    with pytest.raises(Unrecordable):
        observe(Loop(WRONG[name]))


class Noisy(Loop):
    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().route(x + torch.randn_like(x))


class Counting(Loop):
    calls = 0

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return super().route(x)


class Writing(Loop):
    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().route(x.mul_(0.5))


class Reading(Loop):
    outside = torch.ones(EXPERTS)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = super().route(x)
        return weights * type(self).outside[ids], ids


class TwiceUsed(Loop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.pool[0](x)


class Soft(Block):
    def __init__(self, _: Term) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.score(x).softmax(-1)
        parts = [expert(x) * gates[:, i : i + 1] for i, expert in enumerate(self.pool)]
        return torch.stack(parts).sum(0)


class Chain(Block):
    def __init__(self, _: Term) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for expert in self.pool:
            x = x + expert(x)
        return x


@pytest.mark.parametrize("kind", [Noisy, Counting, Writing, Reading, TwiceUsed, Soft, Chain])
def test_modules_that_do_more_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(Unrecordable):
        observe(kind(lambda y, w, *_: y * w))


def test_a_refused_module_is_as_it_was() -> None:
    module = Noisy(lambda y, w, *_: y * w).eval()
    state = torch.random.get_rng_state()
    with pytest.raises(Unrecordable):
        observe(module)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any("forward" in expert.__dict__ for expert in module.pool)


@pytest.mark.parametrize(
    ("make", "activation"),
    [
        (Glu, "mul(silu(gate), up)"),
        (Merged, "mul(gelu_tanh(gate), up)"),
        (plain_mlp, "relu(x)"),
    ],
)
def test_an_expert_is_read(make: Callable[[], nn.Module], activation: str) -> None:
    expert = read_module(make().eval())
    assert str(expert.activation) == activation
    assert (expert.hidden, expert.intermediate) == (HIDDEN, INNER)


NO_EXPERTS = {
    "one product": lambda: nn.Linear(HIDDEN, HIDDEN),
    "three products": lambda: nn.Sequential(
        *(layer for _ in range(3) for layer in (nn.Linear(HIDDEN, HIDDEN), nn.ReLU())),
        nn.Linear(HIDDEN, HIDDEN),
    ),
    "a norm in front": lambda: nn.Sequential(nn.LayerNorm(HIDDEN), plain_mlp()),
    "a norm between": lambda: nn.Sequential(
        nn.Linear(HIDDEN, INNER), nn.LayerNorm(INNER), nn.Linear(INNER, HIDDEN)
    ),
    "a residual": lambda: Residual(),
    "no weights": lambda: nn.ReLU(),
}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = plain_mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize("name", NO_EXPERTS)
def test_what_is_no_expert_is_refused(name: str) -> None:
    with pytest.raises(Unrecordable):
        read_module(NO_EXPERTS[name]().eval())

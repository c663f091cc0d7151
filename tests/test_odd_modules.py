"""Modules that are built or changed in odd ways: adopting them never fails, never changes them."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moecc
from moecc import capture
from moecc.passes.options import Options
from tests.loops import EXPERTS, HIDDEN, INNER, Block, Glu, WhereLoop
from tests.models import relative_error

OPTIONS = Options(inner="eager", kernels="torch")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def adopt(model: nn.Module) -> list[str]:
    """Adopt a model and give the reasons of what was left alone."""
    capture.take_notes()
    capture.adopt(model.eval(), OPTIONS)
    return [miss.why for miss in capture.take_notes()]


def calls(model: nn.Module) -> int:
    eager = moecc.report(model).eager
    return 0 if eager is None else eager.calls


class Nested(WhereLoop):
    """Attributes that cannot be hashed."""

    sizes = ([1], 2)


class Delegating(nn.Module):
    """A wrapper that shows the attributes of what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.module = WhereLoop()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.module(*args, **kwargs)


class Locked(WhereLoop):
    """It cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Residual(WhereLoop):
    """A subclass that calls what it overrides."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + inputs


class Lists(nn.Module):
    """Experts in lists of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, EXPERTS)
        self.wide = nn.ParameterList(torch.randn(INNER, HIDDEN) for _ in range(EXPERTS))
        self.narrow = nn.ParameterList(torch.randn(HIDDEN, INNER) for _ in range(EXPERTS))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weights, ids = self.score(inputs).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(inputs)
        for number, (wide, narrow) in enumerate(zip(self.wide, self.narrow, strict=True)):
            token, slot = torch.where(ids == number)
            rows = F.linear(F.silu(F.linear(inputs[token], wide)), narrow)
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out


def shared() -> nn.Module:
    """Make two blocks with the same experts."""
    model = nn.Sequential(WhereLoop(), WhereLoop())
    model[1].pool = model[0].pool
    return model


def normed() -> nn.Module:
    """Make a block with parametrised weights."""
    model = WhereLoop()
    for expert in model.pool:
        nn.utils.parametrizations.weight_norm(expert.a)
    return model


def wrapped_block() -> nn.Module:
    """Put a forward around a block's own, as dispatchers of devices do."""
    model: Any = WhereLoop()
    own = model.forward
    model.forward = lambda inputs: own(inputs) * 2
    return model


def wrapped_expert() -> nn.Module:
    """Put a forward around that of one expert."""
    model: Any = WhereLoop()
    own = model.pool[1].forward
    model.pool[1].forward = lambda inputs: own(inputs) * 2
    return model


def hooked() -> nn.Module:
    model: Any = WhereLoop()
    model.pool[1].register_forward_hook(lambda _module, _args, out: out * 2)
    return model


def parallel() -> nn.Module:
    return nn.DataParallel(WhereLoop())


def reused() -> nn.Module:
    block = WhereLoop()
    return nn.Sequential(block, block)


ODD: tuple[tuple[Callable[[], nn.Module], str], ...] = (
    (Nested, ""), (Delegating, ""), (Residual, ""), (parallel, ""), (reused, ""),
    (Locked, "cannot be copied"), (Lists, "experts"), (shared, ""), (normed, ""),
    (wrapped_block, ""), (wrapped_expert, "a forward was put"),
    (hooked, "hooks"),
)  # fmt: skip
"""Models, and what is said of those that stay."""


@pytest.mark.parametrize(("make", "why"), ODD)
def test_an_odd_model_stays_right(make: Callable[[], nn.Module], why: str) -> None:
    torch.manual_seed(3)
    twin = make().eval()
    torch.manual_seed(3)
    model = make()
    x, random = torch.randn(9, HIDDEN), torch.random.get_rng_state()
    reasons = adopt(model)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert relative_error(model(x), twin(x)) < 1e-5
    if why:
        assert [one for one in reasons if why in one]
        assert not calls(model)
    capture.release(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Module(),
        lambda: nn.Sequential(nn.Identity()),
        lambda: nn.Sequential(*(nn.LazyLinear(4) for _ in range(3))),
        lambda: torch.jit.trace(nn.Linear(4, 4), torch.ones(2, 4)),
        lambda: WhereLoop().to("meta"),
    ],
)
def test_a_model_that_cannot_be_looked_at_is_no_error(make: Callable[[], nn.Module]) -> None:
    model = make()
    adopt(model)
    assert not calls(model)


class Stashing(WhereLoop):
    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.last = super().route(x)[0]
        return super().route(x)


class Logging(WhereLoop):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.log.append(x.shape[0])
        return super().route(x)


class Counting(WhereLoop):
    _calls = 0

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._calls += 1
        return super().route(x)


class Loaded(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.int64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weights, ids = self.route(inputs)
        self.load += torch.bincount(ids.view(-1), minlength=EXPERTS)
        out = torch.zeros_like(inputs)
        for number, expert in enumerate(self.pool):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, expert(inputs[token]) * weights[token, slot, None])
        return out


@pytest.mark.parametrize("kind", [Stashing, Logging, Counting, Loaded])
def test_what_calls_leave_behind_is_left_by_the_users_calls_only(kind: type[nn.Module]) -> None:
    torch.manual_seed(3)
    twin: Any = kind().eval()
    torch.manual_seed(3)
    model: Any = kind()
    reasons = adopt(model)
    x = torch.randn(9, HIDDEN)
    assert relative_error(model(x), twin(x)) < 1e-5
    assert [one for one in reasons if "stay a loop" in one]
    for name in ("last", "log", "_calls", "load"):
        one, other = getattr(model, name, None), getattr(twin, name, None)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


class Limited(Glu):
    """Private attributes decide, too."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = 1.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.silu(self.a(x).clamp(max=self._limit)) * self.b(x))


def test_an_expert_with_another_private_attribute_is_seen() -> None:
    model: Any = WhereLoop(Limited)
    model.pool[2]._limit = 0.1
    x = torch.randn(40, HIDDEN)
    expected = model.eval()(x)
    assert [why for why in adopt(model) if "not all alike" in why]
    assert relative_error(model(x), expected) < 1e-5


def test_a_subclass_that_is_called_by_keyword_runs_its_own_code_once() -> None:
    plain, model = WhereLoop(), Residual()
    adopt(plain)
    x = torch.randn(9, HIDDEN)
    expected = model.eval()(x)
    adopt(model)
    assert relative_error(model(inputs=x), expected) < 1e-5
    assert relative_error(model(x), expected) < 1e-5
    assert calls(model) == 1


def test_a_class_that_inherits_its_forward_does_so_again_once_released() -> None:
    class Heir(WhereLoop):
        pass

    model = Heir()
    adopt(model)
    assert "forward" in vars(Heir)
    capture.release(model)
    assert "forward" not in vars(Heir)


def test_banks_have_fixed_sizes_in_dynamic_graphs() -> None:
    model = WhereLoop().eval()
    x = torch.randn(9, HIDDEN)
    expected = model(x)
    options = {"inner": "eager", "kernels": "torch"}
    run = torch.compile(model, backend="moecc", dynamic=True, options=options)
    assert relative_error(run(x), expected) < 1e-5
    assert [len(graph.blocks) for graph in moecc.report(model).graphs] == [1]


def test_a_model_is_observed_once_for_each_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    monkeypatch.setattr(capture, "adopt", lambda model, _: seen.append(model))
    torch.compile(WhereLoop().eval(), backend="moecc")
    assert len(seen) == 1


class Scaled(WhereLoop):
    """Scales that are one, a bias that is zero, a term that is small: at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(HIDDEN))
        self.shift = nn.Parameter(torch.zeros(HIDDEN))
        self.shared = nn.Linear(HIDDEN, HIDDEN)
        nn.init.normal_(self.shared.weight, std=1e-4)
        nn.init.zeros_(self.shared.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs + self.shift) * self.gain + self.shared(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_do_nothing_yet_are_obeyed_later(dtype: torch.dtype) -> None:
    model = Scaled().to(dtype)
    adopt(model)
    for one in (model.gain, model.shift, model.shared.weight):
        one.normal_()
    x = torch.randn(9, HIDDEN, dtype=dtype)
    got = model(x)
    assert calls(model) == 1
    capture.release(model)
    assert relative_error(got, model(x)) < (1e-5 if dtype == torch.float32 else 3e-2)


class Reading(WhereLoop):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + self.pool[0].a.weight.mean()


def test_a_block_that_reads_an_experts_weights_itself_stays() -> None:
    model = Reading()
    assert [why for why in adopt(model) if "reads weights of its experts" in why]


class Rows(Block):
    """The rows that were chosen, in the order of tokens: as many as ids if no gate is zero."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        best, ids = self.score(inputs).sigmoid().topk(1, dim=-1)
        gates = inputs.new_zeros(len(inputs), EXPERTS).scatter(1, ids, best)
        out = torch.zeros_like(inputs)
        for token, number in gates.nonzero().tolist():
            out[token] += self.pool[number](inputs[token]) * gates[token, number]
        return out


class Nonzero(Block):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        best, ids = self.score(inputs).sigmoid().topk(1, dim=-1)
        gates = inputs.new_zeros(inputs.shape[0], EXPERTS).scatter(1, ids, best)
        where, order = gates.nonzero().sort(0)
        token = gates.nonzero()[order[:, 1], 0]
        parts = inputs[token].split((gates > 0).sum(0).tolist())
        done = torch.cat([expert(one) for expert, one in zip(self.pool, parts, strict=True)])
        weights = gates[token].gather(1, where[:, 1:])
        return torch.zeros_like(inputs).index_add(0, token, done * weights)


@pytest.mark.parametrize("kind", [Rows, Nonzero])
def test_a_gate_that_underflows_changes_nothing(kind: type[nn.Module]) -> None:
    torch.manual_seed(3)
    twin: Any = kind().eval()
    torch.manual_seed(3)
    model: Any = kind()
    adopt(model)
    x = torch.randn(9, HIDDEN)
    x[4] = -1e6 * twin.score.weight.sum(0).sign()  # every score underflows to zero, or none does
    assert relative_error(model(x), twin(x)) < 1e-5
    model.score.weight.mul_(1e6)
    twin.score.weight.mul_(1e6)
    assert relative_error(model(x), twin(x)) < 1e-5

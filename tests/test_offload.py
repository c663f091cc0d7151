"""moecc.offload: models written by hand, their experts moved to disk."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moecc
from moecc.checkpoint import writing
from moecc.records import all_records
from moecc.runtime.errors import InputError, ModelError, OptionError, StoreError
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.recording import Pooled, Recording, write
from moecc.runtime.offload.stand_in import lender_of
from moecc.runtime.offload.trace import Request
from moecc.tiny import tiny_model
from tests.loops import PutTogether, RouterApart, StackedSlices, WhereLoop
from tests.passes.apart import ApartTwoChoices
from tests.passes.dispatched import Stacked
from tests.passes.test_dense_gates import Dense
from tests.passes.test_gathered import Biased, GptFast, MergedRows

WIDTH = 16
"""Of all these blocks' hidden states."""
STYLES: tuple[Callable[[], nn.Module], ...] = (
    GptFast, MergedRows, Biased, Dense, WhereLoop, RouterApart, PutTogether, Stacked,
    ApartTwoChoices,
)  # fmt: skip
"""Stacked parameters found in graphs, loops over modules and over slices, buffers."""
GIVEN = (ApartTwoChoices, MergedRows, RouterApart)
"""Are offloaded with the inputs of a call, without which one of them is not found."""


class Layers(nn.Module):
    """Two blocks with a residual stream, as in a transformer."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(kind() for _ in range(2))
        self.batched = kind in (Dense, WhereLoop, RouterApart, PutTogether)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + (block(norm(x)[None])[0] if self.batched else block(norm(x)))
        return x


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def make(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Layers(kind).eval()


def tokens(count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


def compiled_outputs(model: nn.Module, **options: Any) -> list[torch.Tensor]:
    """Give outputs of prefill and decode, from one graph of each kind."""
    chosen = {"inner": "eager", **options}
    compiled = torch.compile(model, backend="moecc", dynamic=True, fullgraph=True, options=chosen)
    made = [compiled(tokens(count)) for count in (9, 1)]
    with torch.compiler.set_stance("fail_on_recompile"):
        return [*made, *(compiled(tokens(count)) for count in (1, 1, 30, 5))]


def banks(model: nn.Module) -> list[Bank]:
    found = (lender_of(one) for one in model.parameters())
    return list(dict.fromkeys(one for one in found if isinstance(one, Bank)))


@pytest.mark.parametrize(("kind", "memory"), [*((kind, "50%") for kind in STYLES), (Dense, "100%")])
def test_every_style_gives_the_bits_of_the_resident_model(
    kind: Callable[[], nn.Module], memory: str, tmp_path: Path
) -> None:
    expected = compiled_outputs(make(kind))
    torch._dynamo.reset()
    model = make(kind)
    inputs = (tokens(9),) if kind in GIVEN else ()
    assert moecc.offload(model, *inputs, store=tmp_path, expert_memory=memory) is model
    assert len(banks(model)) == 2
    assert not any(bank.pool.trace.counts.requests for bank in banks(model))
    assert all(map(torch.equal, compiled_outputs(model), expected))
    assert [bank.pool.trace.counts.requests for bank in banks(model)] == [6, 6]
    for bank in banks(model):
        assert (bank.pool.slots < bank.store.experts) == (memory == "50%")


def test_inductor_and_predictions_work_on_it(tmp_path: Path) -> None:
    expected = compiled_outputs(make(GptFast), inner="inductor")
    torch._dynamo.reset()
    model = moecc.offload(make(GptFast), tokens(3), store=tmp_path, expert_memory="50%")
    off = compiled_outputs(model, inner="inductor", lookahead=0)
    assert all(map(torch.equal, off, expected))
    torch._dynamo.reset()
    compiled_outputs(model)
    made = [one for step in all_records()[-1].steps for one in [step.note] if "predictions" in one]
    assert made == ["1 predictions of what follows, up to 1 layers ahead"]
    assert banks(model)[1].guesses.made


def test_eager_calls_use_the_kernels_or_are_refused(tmp_path: Path) -> None:
    looped = moecc.offload(make(WhereLoop), store=tmp_path / "a", expert_memory="50%")
    torch.testing.assert_close(looped(tokens(5)), make(WhereLoop)(tokens(5)))
    found = moecc.offload(make(GptFast), store=tmp_path / "b", expert_memory="50%")
    with pytest.raises(InputError, match=r"GptFast are on disk.*call torch.compile"):
        found(tokens(5))


def test_wanting_gradients_is_refused(tmp_path: Path) -> None:
    model = moecc.offload(make(WhereLoop), store=tmp_path, expert_memory="50%")
    with torch.enable_grad(), pytest.raises(InputError, match=r"on disk.*gradients are wanted"):
        model(tokens(5))


def test_experts_may_be_quantized_on_their_way(tmp_path: Path) -> None:
    scheme = {"*": "int4"}
    expected = compiled_outputs(make(WhereLoop), quantize=scheme)
    torch._dynamo.reset()
    model = make(WhereLoop)
    moecc.offload(model, store=tmp_path, expert_memory="50%", quantize=scheme)
    assert all(bank.schemes is not None for bank in banks(model))
    assert all(map(torch.equal, compiled_outputs(model, quantize=scheme), expected))


def test_a_function_compiled_for_another_scheme_is_refused(tmp_path: Path) -> None:
    model = moecc.offload(make(GptFast), tokens(3), store=tmp_path, quantize="int8")

    def call(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    options = {"inner": "eager", "quantize": "int4"}
    with pytest.raises(Exception, match=r"quantize='int4'.*were loaded in int8; leave it out"):
        torch.compile(call, backend="moecc", options=options)(tokens(3))
    torch._dynamo.reset()
    options["quantize"] = "int8"
    assert torch.compile(call, backend="moecc", options=options)(tokens(3)).isfinite().all()


def test_the_memory_of_the_experts_is_given_back(tmp_path: Path) -> None:
    model = make(PutTogether)
    owned = [weakref.ref(block.wide.untyped_storage()) for block in model.blocks]  # pyright: ignore
    model = moecc.offload(model, tokens(4), store=tmp_path, expert_memory="50%")
    assert [one() for one in owned] == [None, None]
    looped = make(WhereLoop)
    held = weakref.ref(looped.blocks[0].pool[0].a.weight.untyped_storage())  # pyright: ignore
    looped = moecc.offload(looped, store=tmp_path, expert_memory="50%")
    assert held() is None


def test_a_transformers_model_is_moved_too(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 9, 2, 77, 31]])
    model: Any = tiny_model("qwen3_moe", torch.float32)
    expected = torch.compile(model, backend="moecc", options={"inner": "eager"})(ids).logits
    moecc.offload(model, store=tmp_path, expert_memory="25%")
    torch._dynamo.reset()
    got = torch.compile(model, backend="moecc", options={"inner": "eager"})(ids).logits
    assert torch.equal(got, expected)
    with pytest.raises(InputError, match="on disk, not in the model"):
        model.state_dict()


def test_what_cannot_be_moved_stays_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()).eval()
    with pytest.raises(ModelError, match=r"no block of Sequential.*give offload the inputs"):
        moecc.offload(dense, store=tmp_path, expert_memory="50%")
    sliced = StackedSlices().eval()
    with pytest.raises(ModelError, match="a part of parameters"):
        moecc.offload(sliced, tokens(3), store=tmp_path, expert_memory="50%")
    model = make(GptFast)
    before = model.state_dict()
    with pytest.raises(OptionError, match=r"take \d+,\d+ in 2 blocks.*smallest that works"):
        moecc.offload(model, store=tmp_path, expert_memory=1000)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "flush", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(StoreError, match=r"No space.*the model is as it was"):
            moecc.offload(model, store=tmp_path, expert_memory="50%")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    with pytest.raises(ModelError, match="call eval"):
        moecc.offload(make(GptFast).train(), store=tmp_path, expert_memory="50%")
    moecc.offload(model, store=tmp_path, expert_memory="50%")
    with pytest.raises(ModelError, match="on disk already"):
        moecc.offload(model, store=tmp_path, expert_memory="50%")


def test_a_trace_shares_the_memory_and_is_checked_before_anything_is_written(
    tmp_path: Path,
) -> None:
    blocks = [
        Demand(name=bank.store.name, experts=bank.store.experts, active=2, size=64)
        for bank in banks(moecc.offload(make(GptFast), tokens(3), store=tmp_path / "a"))
    ]
    often = [Request(block=1, tokens=1, experts=(n % 4,), hits=0) for n in range(40)]
    one = Pooled(slots=4, asked=0, hits=0, predicted=0)
    run = Recording(
        model="gpt", policy="lru", blocks=tuple(blocks), pool_of=(0, 1), pools=(one, one),
        other_bytes=0, decode_rate=1.0, events=tuple(often),
    )  # fmt: skip
    write(run, tmp_path / "own.jsonl")
    write(
        replace(run, blocks=(blocks[0], replace(blocks[1], experts=64))), tmp_path / "other.jsonl"
    )

    def slots(trace: str) -> list[int]:
        options = {"expert_memory": "50%", "trace": tmp_path / trace}
        model = moecc.offload(make(GptFast), tokens(3), store=tmp_path / "b", **options)
        return [bank.pool.slots for bank in banks(model)]

    with pytest.raises(OptionError, match=r"other.jsonl' is of 'gpt'.*record one of its own"):
        slots("other.jsonl")
    assert not (tmp_path / "b").exists()
    first, second = slots("own.jsonl")
    assert first < second


class ReadsThem(GptFast):
    """A block that also looks at its experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.w1.mean()


def test_a_model_that_reads_its_experts_otherwise_gets_them_back(tmp_path: Path) -> None:
    model = make(ReadsThem)
    expected = model(tokens(4))
    with pytest.raises(Exception, match=r"not in memory.*only moecc's kernels read them"):
        moecc.offload(model, tokens(4), store=tmp_path, expert_memory="50%")
    assert torch.equal(model(tokens(4)), expected)
    assert model.state_dict()

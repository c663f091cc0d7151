"""What happens where something is missing: never silent, never wrong."""

import threading
from collections.abc import Iterator

import pytest
import torch

import moecc
from moecc.codegen import emit
from moecc.codegen.native import emit as native
from moecc.runtime.errors import StrictError
from moecc.tiny import tiny_model
from tests.models import BatchedMoe, relative_error, tokens

OPTIONS = {"inner": "eager"}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native._load.cache_clear()
    emit.choose.cache_clear()
    yield
    emit.choose.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_torch_runs_and_the_report_says_what_to_install() -> None:
    model, x = BatchedMoe(torch.float32), tokens(6, torch.float32)
    with torch.no_grad():
        expected = model(x)
        got = torch.compile(model, backend="moecc", options=OPTIONS)(x)
    assert relative_error(got, expected) < 1e-5
    report = str(moecc.report(model))
    assert "torch: mul(silu(gate), up)" in report
    assert "Install g++" in report


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_strict_refuses() -> None:
    compiled = torch.compile(
        BatchedMoe(torch.float32), backend="moecc", options=OPTIONS | {"strict": True}
    )
    error = (StrictError, torch._dynamo.exc.BackendCompilerFailed)
    with torch.no_grad(), pytest.raises(error, match="no C\\+\\+ compiler"):
        compiled(tokens(6, torch.float32))


def test_threads_that_share_a_compiled_model_get_their_own_results() -> None:
    model = tiny_model("qwen3_moe")
    compiled = torch.compile(model, backend="moecc", dynamic=True, options=OPTIONS)
    inputs = [torch.randint(3, 99, (1, 4 + n)) for n in range(6)]
    with torch.no_grad():
        expected = [compiled(ids, use_cache=False).logits for ids in inputs]
    got: dict[int, torch.Tensor] = {}

    def call(number: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                got[number] = compiled(inputs[number], use_cache=False).logits

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in got.items():
        assert torch.equal(logits, expected[number])
    assert len(got) == len(inputs)


def test_a_token_does_not_depend_on_its_batch() -> None:
    model = tiny_model("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    torch.compile(model, backend="moecc", options=OPTIONS)
    hidden, ids = torch.randn(33, 64), torch.randint(0, 8, (33, 2))
    weights = torch.rand(33, 2)
    with torch.no_grad():
        together = experts(hidden, ids, weights)
        for t in (0, 7, 32):
            alone = experts(hidden[t : t + 1], ids[t : t + 1], weights[t : t + 1])
            assert torch.equal(alone[0], together[t])

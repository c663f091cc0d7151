"""The native emitter: same numbers as the definition, whatever the shape, layout and batch."""

import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.codegen.activation import X, apply
from moecc.codegen.native import build
from moecc.codegen.native.emit import emit, write
from moecc.runtime.errors import BuildError, InputError, NoCompiler, UnsupportedSpec
from tests.codegen.native_cases import (
    DTYPES,
    STYLES,
    assert_close,
    definition,
    make_batch,
    make_experts,
    make_spec,
    rounding,
)

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="native kernels are built on Linux"
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(0, 70), experts=st.integers(1, 9), active=st.integers(1, 9),
    h=st.integers(1, 150), i=st.integers(1, 150), seed=st.integers(0, 9),
)  # fmt: skip
def test_computes_what_the_definition_says(style, dtype, tokens, experts, active, h, i, seed):
    torch.manual_seed(seed)
    spec = make_spec(style, dtype, experts, h, i)
    batch, weights = make_batch(spec, tokens, min(active, experts)), make_experts(spec)
    out = emit(spec).run(*batch, *weights)
    assert out.shape == (tokens, h)
    assert out.dtype == dtype
    error = (out.double() - definition(spec, batch, weights)).norm()
    assert error <= rounding(spec, batch, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_a_token_does_not_depend_on_the_batch_or_on_the_threads(style, dtype):
    torch.manual_seed(0)
    spec = make_spec(style, dtype, experts=3, h=700, i=130)
    batch, weights = make_batch(spec, 130, 2), make_experts(spec)
    run = emit(spec).run
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = run(*batch, *weights)
        torch.set_num_threads(1)
        assert torch.equal(run(*batch, *weights), together)
    finally:
        torch.set_num_threads(before)
    for count in (1, 2, 3, 5, 29):
        alone = run(*(part[:count] for part in batch), *weights)
        assert torch.equal(alone, together[:count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_too_long_for_a_panel_in_l2_are_taken_in_parts(dtype):
    torch.manual_seed(3)
    spec = make_spec("silu", dtype, experts=2, h=3000, i=5001)
    batch, weights = make_batch(spec, 7, 2), make_experts(spec)
    error = (emit(spec).run(*batch, *weights).double() - definition(spec, batch, weights)).norm()
    assert error <= rounding(spec, batch, weights)


def test_an_id_outside_the_experts_contributes_nothing():
    spec = make_spec("gpt-oss", torch.float32)
    (hidden, ids, scores), weights = make_batch(spec, 6, 2), make_experts(spec)
    ids[0] = torch.tensor([-1, spec.experts])
    ids[1, 0] = 1 << 40
    out = emit(spec).run(hidden, ids, scores, *weights)
    assert not out[0].any()
    assert_close(out, definition(spec, (hidden, ids, scores), weights), 1e-6)


def test_all_tokens_may_choose_one_expert_twice():
    spec = make_spec("silu", torch.float32)
    hidden, _, scores = make_batch(spec, 60, 2)
    weights, ids = make_experts(spec), torch.full((60, 2), 2)
    out = emit(spec).run(hidden, ids, scores, *weights)
    assert_close(out, definition(spec, (hidden, ids, scores), weights), 1e-6)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token(style, bad):
    spec = make_spec(style, torch.bfloat16)
    batch, weights = make_batch(spec, 9, 2), make_experts(spec)
    clean = emit(spec).run(*batch, *weights)
    batch[0][4, 7] = bad
    out = emit(spec).run(*batch, *weights)
    assert not out[4].isfinite().all()
    if bad != bad:
        assert out[4].isnan().all()
    others = [t for t in range(9) if t != 4]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("name", ["silu", "sigmoid", "tanh", "exp", "gelu", "gelu_tanh", "relu"])
def test_an_activation_is_right_over_its_whole_range(name):
    values = torch.cat([torch.linspace(-120, 120, 4001), torch.linspace(-1, 1, 999)])
    values = torch.cat([values, torch.tensor([float("nan"), float("inf"), -3e38, 1e-30])])
    spec = make_spec("relu2", torch.float32, experts=1, h=1, i=1)
    one, first = torch.ones(1, 1, 1), torch.zeros(len(values), 1, dtype=torch.int64)
    run = emit(replace(spec, activation=apply(name, X))).run
    got = run(values[:, None], first, torch.ones(len(values), 1), one, one, None, None)[:, 0]
    evaluate = {
        "exp": torch.exp, "gelu": torch.nn.functional.gelu, "relu": torch.relu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu, "tanh": torch.tanh,
    }  # fmt: skip
    want = evaluate[name](values.double()).float()
    torch.testing.assert_close(got, want, rtol=5e-7, atol=1e-7, equal_nan=True)


def test_reads_weights_wherever_they_lie():
    spec = make_spec("silu", torch.bfloat16, experts=3)
    batch, (first, second, *_) = make_batch(spec, 5, 2), make_experts(spec)
    plain = emit(spec).run(*batch, first, second, None, None)
    apart = torch.zeros(7, spec.rows * 2, spec.hidden + 3, dtype=spec.dtype)
    strided = apart[1::2, ::2, 3:]  # every other expert and row, from an odd element on
    strided.copy_(first)
    assert torch.equal(emit(spec).run(*batch, strided, second, None, None), plain)


def test_reads_small_tensors_in_any_layout_and_dtype():
    spec = make_spec("silu", torch.float32)
    (hidden, ids, scores), weights = make_batch(spec, 5, 2), make_experts(spec)
    plain = emit(spec).run(hidden, ids, scores, *weights)
    other = emit(spec).run(
        hidden.T.contiguous().T, ids.T.contiguous().T.int(), scores.double(), *weights
    )
    assert torch.equal(other, plain)
    doubles = emit(spec).run(hidden.double(), ids, scores, *weights)
    assert doubles.dtype == torch.float64
    assert torch.equal(doubles, plain.double())


def test_weights_that_change_between_calls_are_read_as_they_are_now():
    spec = make_spec("gelu_tanh", torch.float32)
    batch, experts = make_batch(spec, 3, 2), make_experts(spec)
    first, second, bias, *_ = experts
    run = emit(spec).run

    def holds() -> None:
        for _ in range(2):  # the second time they are known
            error = (run(*batch, *experts).double() - definition(spec, batch, experts)).norm()
            assert error <= rounding(spec, batch, experts)

    holds()
    first.data = torch.randn_like(first)  # elsewhere
    holds()
    second.mul_(2)
    holds()
    values = second.data
    for other in (values.mT, values.view(torch.int32)):  # where they were, in other layouts, dtypes
        second.data = other
        with pytest.raises(InputError, match="down is"):
            run(*batch, *experts)
        second.data = values
        holds()
    bias.data = torch.randn(*bias.shape, 2)[..., 0]  # no longer contiguous, so copied
    holds()
    bias.mul_(2)
    holds()


def test_an_input_that_does_not_fit_is_named():
    spec = make_spec("silu", torch.float32)
    (hidden, ids, scores), (first, second, *_) = make_batch(spec, 5, 2), make_experts(spec)
    run = emit(spec).run
    with pytest.raises(InputError, match=r"gate_up is .*\[4, 40, 48\].*expected .*\[4, 48, 40\]"):
        run(hidden, ids, scores, first.mT.contiguous(), second, None, None)
    with pytest.raises(InputError, match=r"gate_up .*call .contiguous"):
        run(hidden, ids, scores, first.mT.contiguous().mT, second, None, None)
    with pytest.raises(InputError, match=r"down is torch.float16 .*expected torch.float32"):
        run(hidden, ids, scores, first, second.half(), None, None)
    with pytest.raises(InputError, match=r"hidden is .*\[5, 39\].*expected \[T, 40\]"):
        run(hidden[:, 1:], ids, scores, first, second, None, None)
    with pytest.raises(InputError, match=r"ids is torch.float32 .*expected integers"):
        run(hidden, scores, scores, first, second, None, None)
    with pytest.raises(InputError, match=r"weights is .*expected \[5, 2\]"):
        run(hidden, ids, scores[:, :1], first, second, None, None)
    with pytest.raises(InputError, match=r"hidden is .*on meta"):
        run(hidden.to("meta"), ids, scores, first, second, None, None)
    with pytest.raises(InputError, match="bias was given"):
        run(hidden, ids, scores, first, second, second[:, :, 0], None)
    biased = emit(make_spec("gelu_tanh", torch.float32)).run
    with pytest.raises(InputError, match="gate_up_bias is missing"):
        biased(hidden, ids, scores, first, second, None, None)
    with pytest.raises(InputError, match="learned was given"):
        run(hidden, ids, scores, first, second, None, None, None, second[:, 0])
    learned = emit(make_spec("st-moe", torch.float32))
    biases = torch.zeros(4, 48), torch.zeros(4, 40)
    with pytest.raises(InputError, match=r"learned is missing; expected .*\[4, 24\]"):
        learned.run(hidden, ids, scores, first, second, *biases)


def test_one_source_serves_every_shape():
    assert write(make_spec("silu", torch.float32)) == write(
        make_spec("silu", torch.float32, experts=9, h=3, i=5)
    )


def test_declines_what_it_cannot_write():
    with pytest.raises(UnsupportedSpec, match="float64"):
        emit(make_spec("silu", torch.float64))
    with pytest.raises(UnsupportedSpec, match="'cuda'"):
        emit(replace(make_spec("silu", torch.float32), device="cuda"))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moecc"


TINY = 'extern "C" int answer() { return 42; }\n'


def test_the_cache_is_for_its_owner_only(empty_cache):
    assert build.load(TINY).answer() == 42
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700
    empty_cache.chmod(0o755)
    assert build.cache_folder() == empty_cache
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700


def test_a_folder_that_is_not_ours_is_not_used(empty_cache, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    empty_cache.symlink_to(tmp_path / "elsewhere")
    assert build.cache_folder() != empty_cache
    assert build.load(TINY).answer() == 42
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_damaged_library_is_built_again(empty_cache):
    library = build.build(TINY, build.find_compiler())
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert build.build(TINY, build.find_compiler()) == library
    assert len(library.read_bytes()) == len(whole)


def test_a_sound_library_is_not_built_again(empty_cache):
    library = build.build(TINY, build.find_compiler())
    before = library.stat().st_mtime_ns
    build.build(TINY, build.find_compiler())
    assert library.stat().st_mtime_ns == before
    assert [path for path in empty_cache.iterdir() if path.is_dir()] == []


def test_two_processes_may_build_at_once(empty_cache):
    program = f"from moecc.codegen.native.build import load; print(load({TINY!r}).answer())"
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in running] == ["42\n", "42\n"]


def test_no_compiler_says_what_was_tried_and_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompiler, match=r"'c\+\+': not found.*clang\+\+.*apt install g\+\+"):
        build.load(TINY)


def test_a_compiler_that_does_not_work_is_no_compiler(monkeypatch, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'error: out of ink' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NoCompiler, match="out of ink"):
        build.find_compiler()


def test_source_that_does_not_compile_is_a_build_error(empty_cache):
    with pytest.raises(BuildError, match=r"error: .*nonsense"):
        build.load("nonsense\n")
    assert not any(path.is_dir() for path in empty_cache.iterdir())  # nothing half built

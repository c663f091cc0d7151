"""Native dense layers: same numbers as float64, whatever the shape, layout, batch and threads."""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.codegen.native import isa, linear
from moecc.runtime import linear as operator
from moecc.runtime.errors import InputError, UnsupportedSpec
from moecc.runtime.schemes.packing import dequantize, quantize
from moecc.runtime.schemes.scheme import SCHEMES, Scheme
from tests.codegen.sanitized import Found, run_sanitized
from tests.models import relative_error

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="native kernels are built on Linux"
)

UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""What rounding the result once is off by, at most, relative to it."""
SHAPES = [(1, 1, 1), (0, 40, 24), (7, 77, 45), (50, 130, 66), (3, 301, 129), (5, 2600, 70)]
MACHINES = ["native", "haswell", "x86-64"]
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def make_layer(dtype: torch.dtype, tokens: int, k: int, n: int, bias: bool = True) -> Layer:
    x, weight = torch.randn(tokens, k), torch.randn(n, k) / k**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(n).to(dtype) if bias else None


def runner(dtype: torch.dtype, *scheme: Scheme) -> Callable[..., torch.Tensor]:
    """Give a kernel as a function of one layer."""
    run = linear.emit(dtype, *scheme).run
    return lambda x, weight, bias: run(x, (weight,), (bias,))[0]


def sanitized(layer: Layer, *given: object, change: tuple[str, str] | None = None) -> torch.Tensor:
    x, weight, bias = layer
    return run_sanitized((linear, *given), x, (weight,), (bias,), change=change)[0]


def several(dtype: torch.dtype, tokens: int, k: int) -> tuple[Any, Any, Any]:
    """Make inputs, and weights and biases of as many layers as one call takes."""
    layers = [make_layer(dtype, tokens, k, n, n != 33) for n in (1, 150, 33, 16)]
    return layers[0][0], [one[1] for one in layers], [one[2] for one in layers]


def assert_exact(got: torch.Tensor, layer: Layer) -> None:
    """Hold a result against float64: one rounding, and float32's in adding up absolute values."""
    x, weight, bias = (None if one is None else one.double() for one in layer)
    assert x is not None
    assert weight is not None
    want = torch.nn.functional.linear(x, weight, bias)
    terms = x.abs() @ weight.abs().T + (0 if bias is None else bias.abs())
    error = (got.double() - want).abs()
    tiny = torch.finfo(got.dtype).smallest_normal  # below it, steps have one size
    bound = UNIT[got.dtype] * (want.abs() + tiny) + 2**-20 * terms
    assert got.dtype == layer[0].dtype
    assert bool((error <= bound).all())


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 70), k=st.integers(1, 300), n=st.integers(1, 150), bias=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_computes_what_float64_says(machine, dtype, tokens, k, n, bias, seed):
    torch.manual_seed(seed)
    layer = make_layer(dtype, tokens, k, n, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", f"{os.environ.get('CXXFLAGS', '')} -march={machine}")
        linear._load.cache_clear()
        out = runner(dtype)(*layer)
    linear._load.cache_clear()
    assert out.shape == (tokens, n)
    assert_exact(out, layer)


@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(700, 130), (5001, 50), (64, 1000)])
def test_a_token_does_not_depend_on_the_batch_or_on_the_threads(dtype, k, n):
    layer = x, weight, bias = make_layer(dtype, 130, k, n)
    run = runner(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = run(*layer)
        assert_exact(together, layer)
        for threads in (1, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(run(*layer), together)
    finally:
        torch.set_num_threads(before)
    for count in (1, 2, 3, 5, 29):
        assert torch.equal(run(x[:count], weight, bias), together[:count])


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        *((name, "native") for name in ("int8", "int4", "mxfp4", "fp8-b128")),
        ("int8", "haswell"),
        ("int4", "x86-64"),
    ],
)
def test_low_bits_compute_what_codes_stand_for(name, machine, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", f"{os.environ.get('CXXFLAGS', '')} -march={machine}")
    linear._load.cache_clear()
    scheme, (x, weight, bias) = SCHEMES[name], make_layer(torch.bfloat16, 53, 300, 77)
    run = runner(torch.bfloat16, scheme)
    linear._load.cache_clear()
    together = run(x, weight, bias)
    codes = dequantize(quantize(weight, scheme), scheme)[:, :300].bfloat16()
    want = torch.nn.functional.linear(x.double(), codes.double(), bias.double())
    assert relative_error(together, want) < 0.015  # inputs have 8 bits, or bf16 results
    assert torch.equal(run(x[5:6], weight, bias), together[5:6])


def test_low_bit_copies_are_packed_once_and_again_after_a_write(monkeypatch):
    packed, pack = [], linear.pack
    monkeypatch.setattr(linear, "pack", lambda *given: packed.append(1) or pack(*given))
    x, weight, _ = make_layer(torch.float32, 2, 64, 32)
    runs = [runner(torch.float32, SCHEMES["int8"]) for _ in range(2)]  # of two graphs
    first = [run(x, weight, None) for run in runs]
    weight.mul_(2)
    assert torch.allclose(runs[0](x, weight, None), 2 * first[1])
    assert len(packed) == 2


@pytest.mark.parametrize("scheme", [(), (SCHEMES["int8"],)], ids=["bf16", "int8"])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_layers_of_one_call_have_the_bits_of_calls_of_their_own(scheme, tokens):
    x, weights, biases = several(torch.bfloat16, tokens, 77)
    together = linear.emit(torch.bfloat16, *scheme).run(x, weights, biases)
    run = runner(torch.bfloat16, *scheme)
    for out, weight, bias in zip(together, weights, biases, strict=True):
        assert torch.equal(out, run(x, weight, bias))
    watched = run_sanitized((linear, torch.bfloat16, *scheme), x, weights, biases)
    assert all(map(torch.equal, watched, together))


@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
def test_tensors_may_lie_anywhere(dtype):
    layer = x, weight, bias = make_layer(dtype, 6, 40, 24)
    run = runner(dtype)
    plain = run(*layer)
    apart = torch.zeros(48, 43, dtype=dtype)[::2, 3:]  # every other row, from an odd element on
    apart.copy_(weight)
    assert torch.equal(run(x.T.contiguous().T, apart, bias), plain)
    assert torch.equal(run(x.view(2, 3, 40), weight, bias), plain.view(2, 3, 24))
    assert torch.equal(run(x[0], weight, bias), plain[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token(bad):
    x, weight, bias = make_layer(torch.bfloat16, 9, 40, 24)
    run = runner(torch.bfloat16)
    clean = run(x, weight, bias)
    x[4, 7] = bad
    out = run(x, weight, bias)
    assert not out[4].isfinite().any()
    others = [t for t in range(9) if t != 4]
    assert torch.equal(out[others], clean[others])


def test_subnormal_values_count():
    x = torch.full((1, 64), 1e-5).half()
    assert runner(torch.float16)(x, torch.full((1, 64), 3e-6).half() * 64, None) > 0


def test_an_input_that_does_not_fit_is_named():
    x, weight, bias = make_layer(torch.bfloat16, 5, 40, 24)
    run = runner(torch.bfloat16)
    with pytest.raises(InputError, match=r"x is torch.bfloat16 \[5, 39\].*takes .*\[.., 40\]"):
        run(x[:, 1:], weight, bias)
    with pytest.raises(InputError, match=r"weight is .*strides \[1, 24\].*rows contiguous"):
        run(x, weight.T.contiguous().T, bias)
    with pytest.raises(InputError, match=r"weight is torch.float16 .*takes torch.bfloat16"):
        run(x, weight.half(), bias)
    with pytest.raises(InputError, match=r"bias is .*\[23\].*takes .*\[24\]"):
        run(x, weight, weight.flatten()[:23])
    with pytest.raises(InputError, match="meta"):
        run(x, weight.to("meta"), bias)
    with pytest.raises(UnsupportedSpec, match="float32 none"):
        linear.emit(torch.float32)


def test_the_operators_and_their_fakes_agree():
    kernel, layer = linear.emit(torch.float16), make_layer(torch.float16, 6, 40, 24)
    operator.install(kernel.key, kernel.run)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moecc.linear.default, (*layer, kernel.key), test_utils=checks)
    layers = (*several(torch.float16, 6, 40), kernel.key)
    torch.library.opcheck(torch.ops.moecc.linears.default, layers, test_utils=checks)
    with pytest.raises(InputError, match="'another' is not installed in this process"):
        torch.ops.moecc.linear(*layer, "another")


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", linear.DTYPES, ids=str)
def test_the_sanitizers_find_nothing(dtype, machine, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", f"{os.environ.get('CXXFLAGS', '')} -march={machine}")
    for tokens, k, n in SHAPES:
        for bias in (False, True):
            layer = make_layer(dtype, tokens, k, n, bias)
            assert_exact(sanitized(layer, dtype), layer)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8-b128"])
def test_the_sanitizers_find_nothing_in_low_bits(name):
    for tokens, k, n in SHAPES:
        layer = make_layer(torch.bfloat16, tokens, k, n)
        want = runner(torch.bfloat16, SCHEMES[name])(*layer)
        assert torch.equal(sanitized(layer, torch.bfloat16, SCHEMES[name]), want)


def test_the_sanitizers_find_a_planted_mistake():
    change = ("std::min(width, call.N[layer] - from)", "width")
    with pytest.raises(Found, match="heap-buffer-overflow"):
        sanitized(make_layer(torch.bfloat16, 3, 40, 25), torch.bfloat16, change=change)


@pytest.mark.parametrize(
    ("machine", "bf16", "fp16"),
    [("haswell", False, False), ("cooperlake", True, False), ("sapphirerapids", True, True)],
)
def test_the_compiler_knows_what_a_cpu_computes_in(machine, bf16, fp16, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", f"-march={machine}")
    assert isa.multiplies(torch.bfloat16) == bf16
    assert isa.multiplies(torch.float16) == fp16

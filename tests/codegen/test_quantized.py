"""Native kernels with low-bit weights, beside the integer products that they stand for."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moecc.codegen import reference
from moecc.codegen.activation import evaluate
from moecc.codegen.native.emit import _load, emit, write
from moecc.codegen.reference import split_gate_up
from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError, UnsupportedSpec
from moecc.runtime.schemes.packing import pack_experts, unpack_experts
from moecc.runtime.schemes.scheme import (
    FP8,
    FP8_BLOCKS,
    INT8,
    MXFP4,
    SCHEMES,
    Scheme,
    Schemes,
    grouped,
    int4,
)
from tests.codegen.native_cases import make_batch, make_experts, make_spec

KINDS = [
    *(INT8, MXFP4, int4(), int4(64, zeros=True), FP8, FP8_BLOCKS),
    *(grouped("int2"), grouped("int3", 64, zeros=True)),
    Schemes(first=int4(), second=INT8),
    Schemes(first=FP8, second=int4(128)),
]
"""Schemes of each code path; group sizes differ by a loop bound."""
schemes = pytest.mark.parametrize("scheme", KINDS, ids=str)
SHAPES = [(256, 128), (200, 72), (77, 45)]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def low_bit(style: str, scheme: Scheme | Schemes, dtype: torch.dtype, h: int, i: int) -> KernelSpec:
    spec = make_spec(style, dtype, h=h, i=i)
    flags = {"interleaved": False, "transposed": False, "down_transposed": False}
    if isinstance(scheme, Scheme):
        scheme = Schemes(first=scheme, second=scheme)
    return replace(spec, schemes=scheme, split=spec.gated, **flags)


def packed(spec: KernelSpec) -> list[torch.Tensor | None]:
    assert spec.schemes is not None
    plain = replace(spec, dtype=torch.float32, schemes=None)
    first, second, bias, second_bias, up, learned = make_experts(plain)
    kinds = (spec.schemes.first, spec.schemes.second, spec.schemes.first)
    weights = [
        None if one is None else pack_experts(one, scheme)
        for one, scheme in zip((first, second, up), kinds, strict=True)
    ]
    vectors = [None if one is None else one.to(spec.dtype) for one in (bias, second_bias, learned)]
    return [weights[0], weights[1], *vectors[:2], weights[2], vectors[2]]


def as_read(rows: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round each block of a row to 8 bits if kernels do."""
    if not scheme.rounds_inputs:
        return rows.double()
    block = scheme.block
    blocks = F.pad(rows.float(), (0, -rows.shape[-1] % block)).unflatten(-1, (-1, block))
    most = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(most > 0, 127 / most, 0)).round()
    return (codes.double() * (most / 127).double()).flatten(-2)[..., : rows.shape[-1]]


def products(spec: KernelSpec, batch: Any, experts: Any) -> torch.Tensor:
    """Compute what the kernel stands for: rounded inputs times dequantized weights, in float64."""
    assert spec.schemes is not None
    one, two = spec.schemes.first, spec.schemes.second
    hidden, ids, weights = batch
    first, second, bias, second_bias, up, learned = experts
    sizes = (spec.experts, spec.intermediate, spec.hidden)
    matrices = [unpack_experts(part, sizes, one) for part in (first, up) if part is not None]
    down = unpack_experts(second, (spec.experts, sizes[2], sizes[1]), two).double()
    wide = torch.cat(matrices, dim=1).double()
    x = as_read(hidden, one)
    out = torch.zeros(*hidden.shape, dtype=torch.float64)
    for slot in range(ids.shape[1]):
        rows = torch.einsum("th,tih->ti", x, wide[ids[:, slot]])
        rows = rows if bias is None else rows + bias[ids[:, slot]].double()
        leaves = split_gate_up(rows.float(), spec)
        if learned is not None:
            leaves["learned"] = learned[ids[:, slot]].float()
        inner = as_read(evaluate(spec.activation, **leaves), two)
        terms = torch.einsum("ti,thi->th", inner, down[ids[:, slot]])
        terms = terms if second_bias is None else terms + second_bias[ids[:, slot]].double()
        out += weights[:, slot, None].double() * terms
    return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("style", "scheme"),
    [("relu2", one) for one in dict.fromkeys(SCHEMES.values())]
    + [(style, k) for style in ("gelu_tanh", "st-moe") for k in KINDS],
    ids=str,
)
@pytest.mark.parametrize(("h", "i"), SHAPES)
def test_computes_the_integer_products(
    scheme: Scheme | Schemes, h: int, i: int, style: str
) -> None:
    torch.manual_seed(h + i)
    spec = low_bit(style, scheme, torch.float32, h, i)
    experts = packed(spec)
    for tokens in (1, 5, 50):
        batch = make_batch(spec, tokens, 2)
        got = emit(spec).run(*batch, *experts)
        # An activation may differ in its last bit, and so be rounded to the code next to it.
        assert error(got, products(spec, batch, experts)) < 2e-3
        close = (got.double() - products(spec, batch, experts)).abs() < 1e-4
        assert float(close.double().mean()) > 0.9


@schemes
def test_is_as_near_to_the_weights_as_8_bits_of_input_allow(scheme: Scheme | Schemes) -> None:
    torch.manual_seed(1)
    spec = low_bit("gelu_tanh", scheme, torch.float32, 512, 256)
    experts, batch = packed(spec), make_batch(spec, 16, 2)
    want = reference.emit(spec).run(*batch, *experts)
    assert error(emit(spec).run(*batch, *experts), want.double()) < 0.02


@pytest.mark.parametrize("scheme", [INT8, MXFP4], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_states_and_results_have_the_models_dtype(
    scheme: Scheme | Schemes, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    spec = low_bit("gelu_tanh", scheme, dtype, 200, 72)
    experts, batch = packed(spec), make_batch(spec, 7, 2)
    got = emit(spec).run(*batch, *experts)
    assert got.dtype == dtype
    assert error(got, products(spec, batch, experts)) < 2e-3 + 2 * ROUNDING[dtype]


@schemes
def test_a_token_does_not_depend_on_the_batch_or_on_the_threads(scheme: Scheme | Schemes) -> None:
    spec = low_bit("gelu_tanh", scheme, torch.float32, 200, 136)
    experts, (hidden, ids, weights) = packed(spec), make_batch(spec, 61, 3)
    run = emit(spec).run
    whole = run(hidden, ids, weights, *experts)
    alone = [
        run(hidden[t : t + 1], ids[t : t + 1], weights[t : t + 1], *experts) for t in range(61)
    ]
    assert torch.equal(torch.cat(alone), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(hidden, ids, weights, *experts), whole)
    finally:
        torch.set_num_threads(threads)


@schemes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_token(scheme: Scheme | Schemes, bad: float) -> None:
    spec = low_bit("gelu_tanh", scheme, torch.float32, 200, 72)
    experts, (hidden, ids, weights) = packed(spec), make_batch(spec, 9, 2)
    clean = emit(spec).run(hidden, ids, weights, *experts)
    hidden[4, 150] = bad
    got = emit(spec).run(hidden, ids, weights, *experts)
    assert not got[4].isfinite().any()
    assert torch.equal(got[[*range(4), *range(5, 9)]], clean[[*range(4), *range(5, 9)]])


@schemes
def test_tiny_and_zero_inputs(scheme: Scheme | Schemes) -> None:
    spec = low_bit("relu2", scheme, torch.float32, 96, 64)
    experts, (hidden, ids, weights) = packed(spec), make_batch(spec, 3, 2)
    hidden[0], hidden[1] = 0, 1e-41
    got = emit(spec).run(hidden, ids, weights, *experts)
    assert not got[0].any()
    assert got.isfinite().all()


@schemes
def test_no_tokens_and_ids_outside_the_experts(scheme: Scheme | Schemes) -> None:
    spec = low_bit("gelu_tanh", scheme, torch.float32, 96, 64)
    experts, (hidden, ids, weights) = packed(spec), make_batch(spec, 6, 2)
    run = emit(spec).run
    assert run(hidden[:0], ids[:0], weights[:0], *experts).shape == (0, 96)
    ids[:, 1] = torch.tensor([-1, 4, 99, -5, 2**40, 7])
    assert torch.equal(
        run(hidden, ids, weights, *experts), run(hidden, ids[:, :1], weights[:, :1], *experts)
    )


@pytest.mark.parametrize("machine", ["haswell", "skylake-avx512", "x86-64"])
@pytest.mark.parametrize("scheme", KINDS, ids=str)
def test_every_instruction_set_computes_the_same(
    scheme: Scheme | Schemes, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if machine == "skylake-avx512" and "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-512")
    torch.manual_seed(5)
    spec = low_bit("relu2", scheme, torch.float32, 200, 136)
    experts, batch = packed(spec), make_batch(spec, 11, 2)
    here = emit(spec).run(*batch, *experts)
    monkeypatch.setenv("CXXFLAGS", f"{os.environ.get('CXXFLAGS', '')} -march={machine}")
    _load.cache_clear()
    try:
        there = emit(spec).run(*batch, *experts)
    finally:
        _load.cache_clear()
    assert error(there, here.double()) < 1e-5


def test_a_tensor_that_is_not_packed_so_is_named() -> None:
    spec = low_bit("silu", INT8, torch.float32, 96, 64)
    experts, batch = packed(spec), make_batch(spec, 2, 2)
    for place, name in ((0, "gate_up"), (1, "down"), (4, "up")):
        wrong = [*experts]
        wrong[place] = torch.zeros(4, 17, dtype=torch.uint8)
        with pytest.raises(InputError, match=rf"{name} is torch.uint8.*packed as int8"):
            emit(spec).run(*batch, *wrong)
    with pytest.raises(InputError, match="up is missing"):
        emit(spec).run(*batch, *experts[:4], None, None)


def test_layouts_that_packing_does_not_know_are_declined() -> None:
    spec = low_bit("silu", INT8, torch.float32, 96, 64)
    for flags in ({"split": False}, {"transposed": True}, {"down_transposed": True}):
        with pytest.raises(UnsupportedSpec, match="output-major"):
            write(replace(spec, **flags))

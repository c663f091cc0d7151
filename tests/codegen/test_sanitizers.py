"""Native kernels under the address and undefined-behaviour sanitizers, with the same results."""

import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from moecc.codegen.native.emit import emit
from moecc.codegen.spec import KernelSpec
from moecc.runtime.schemes.scheme import INT8, MXFP4
from tests.codegen.native_cases import DTYPES, STYLES, make_batch, make_experts, make_spec
from tests.codegen.sanitized import Found, run_sanitized
from tests.codegen.test_quantized import KINDS, low_bit, packed

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="native kernels are built on Linux"
)

SHAPES = [  # T, E, K, H, I
    (1, 1, 1, 1, 1),
    (0, 3, 2, 40, 24),
    (7, 5, 2, 77, 45),
    (50, 2, 2, 130, 66),
    (3, 9, 4, 301, 129),
    (5, 2, 1, 2600, 70),
]
FLOATS = [
    ("silu", torch.float32),
    ("silu", torch.bfloat16),
    ("silu", torch.float16),
    ("gpt-oss", torch.float32),
    ("gpt-oss", torch.bfloat16),
    ("relu2", torch.float32),
    ("gelu_tanh", torch.float16),
    ("dbrx", torch.bfloat16),
    ("first-transposed", torch.float16),
    ("split", torch.bfloat16),
    ("st-moe", torch.float32),
    ("swish", torch.bfloat16),
]
"""Each style and each dtype."""


def same_as_plain(spec: KernelSpec, batch: Any, experts: Any) -> None:
    got = run_sanitized(spec, *batch, *experts)
    assert torch.equal(got, emit(spec).run(*batch, *experts))


def awkward(batch: tuple[torch.Tensor, ...], experts: int) -> list[tuple[torch.Tensor, ...]]:
    """Change where a batch goes: ids outside the experts, and all tokens to one expert."""
    hidden, ids, weights = batch
    outside = ids.clone()
    outside[:1] = -1
    outside[1:2] = experts
    outside[2:3] = torch.iinfo(torch.int64).min
    return [batch, (hidden, outside, weights), (hidden, torch.full_like(ids, experts - 1), weights)]


@pytest.mark.parametrize(("style", "dtype"), FLOATS, ids=str)
def test_floats_stay_within_their_tensors(style: str, dtype: torch.dtype) -> None:
    for tokens, experts, active, h, i in SHAPES:
        spec = make_spec(style, dtype, experts, h, i)
        weights = make_experts(spec)
        for batch in awkward(make_batch(spec, tokens, active), experts):
            same_as_plain(spec, batch, weights)


@pytest.mark.parametrize("scheme", KINDS, ids=str)
def test_low_bits_stay_within_their_tensors(scheme: Any) -> None:
    style, dtype = ("relu2", torch.float32) if scheme == MXFP4 else ("gelu_tanh", torch.bfloat16)
    for tokens, experts, active, h, i in SHAPES:
        spec = replace(low_bit(style, scheme, dtype, h, i), experts=experts)
        weights = packed(spec)
        for batch in awkward(make_batch(spec, tokens, active), experts):
            same_as_plain(spec, batch, weights)


@pytest.mark.parametrize("machine", ["haswell", "x86-64"])
@pytest.mark.parametrize("kind", [torch.bfloat16, INT8, MXFP4], ids=str)
def test_other_instruction_sets_do_too(
    kind: Any, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXXFLAGS", f"{os.environ.get('CXXFLAGS', '')} -march={machine}")
    for tokens, experts, active, h, i in SHAPES:
        if isinstance(kind, torch.dtype):
            spec = make_spec("silu", kind, experts, h, i)
            weights = make_experts(spec)
        else:
            spec = replace(low_bit("silu", kind, torch.float32, h, i), experts=experts)
            weights = packed(spec)
        run_sanitized(spec, *make_batch(spec, tokens, active), *weights)


def test_rows_and_experts_may_lie_apart() -> None:
    spec = make_spec("silu", torch.bfloat16, h=77, i=45)
    batch, (first, second, *_) = make_batch(spec, 5, 2), make_experts(spec)
    apart = torch.zeros(7, spec.rows * 2, spec.hidden + 3, dtype=spec.dtype)
    strided = apart[::2, 1::2, 3:]  # the last element of the last row is the last of all
    strided.copy_(first)
    same_as_plain(spec, batch, [strided, second, None, None])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38, 1e-41])
def test_no_value_of_hidden_states_is_undefined(bad: float) -> None:
    floats = make_spec("silu", torch.bfloat16)
    codes = low_bit("gelu_tanh", KINDS[0], torch.bfloat16, 40, 24)
    for spec, weights in ((floats, make_experts(floats)), (codes, packed(codes))):
        hidden, ids, shares = make_batch(spec, 3, 2)
        hidden[1, 5] = bad
        run_sanitized(spec, hidden, ids, shares, *weights)


def test_all_styles_and_dtypes_are_here() -> None:
    assert {style for style, _ in FLOATS} == {*STYLES}
    assert {dtype for _, dtype in FLOATS} == {*DTYPES}


PLANTED = {
    "READ of size 64": (  # the last, short line of a row is read as if it were whole
        "memcpy(last[r], w + r * stride + k, (span.to - k) * sizeof(Weight))",
        "memcpy(last[r], w + r * stride + k, LENGTH * sizeof(Weight))",
    ),
    "signed integer overflow": (
        "int64_t slots = layer.T * layer.K",
        "int64_t most = INT64_MAX - layer.K, slots = most + layer.T",
    ),
}


@pytest.mark.parametrize("found", PLANTED)
def test_a_planted_mistake_is_found(found: str) -> None:
    spec = make_spec("silu", torch.float32, h=77)
    batch, weights = make_batch(spec, 5, 2), make_experts(spec)
    with pytest.raises(Found, match=found):
        run_sanitized(spec, *batch, *weights, change=PLANTED[found])

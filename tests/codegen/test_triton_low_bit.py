"""Low-bit weights in Triton: both algorithms, every scheme, beside the torch definition."""

import dataclasses

import pytest
import torch

from moecc.codegen import low_bit, reference
from moecc.codegen.emit import choose
from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError
from moecc.runtime.schemes.scheme import SCHEMES, Schemes

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from moecc.codegen import triton_emitter
from moecc.codegen.triton_inputs import Inputs
from moecc.codegen.triton_launches import plan_launches
from tests.codegen.triton_cases import (
    RELU2,
    STYLES,
    assert_close,
    decode,
    grouped,
    make_inputs,
    make_spec,
    tensors,
)
from tests.codegen.triton_interpreter import interpreted

NAMES = ("int8", "int4", "int4-g64", "int4-g128-zeros", "mxfp4", "fp8", "fp8-b128")
ODD = {"hidden": 200, "intermediate": 72, "experts": 2}
"""Neither is a multiple of a group of 64 or of a block, nor do 72 rows fill their panels."""


def pack(spec: KernelSpec, first: str, second: str, x: Inputs) -> tuple[KernelSpec, Inputs]:
    """Quantize the matrices of a case."""
    schemes = Schemes(first=SCHEMES[first], second=SCHEMES[second])
    packed = low_bit.packed_kernel(spec, schemes, "triton").spec
    names = ("gate_up", "down", "gate_up_bias", "down_bias", "up", "learned")
    low = low_bit.packed_tensors(spec, schemes, [getattr(x, name) for name in names])
    return packed, dataclasses.replace(x, **dict(zip(names, low, strict=True)))


def defined(spec: KernelSpec, x: Inputs) -> torch.Tensor:
    """Compute in float32 from the weights that the codes stand for."""
    wide = [t.float() if t is not None and t.is_floating_point() else t for t in tensors(x)]
    return reference.emit(dataclasses.replace(spec, dtype=torch.float32)).run(*wide)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in NAMES), ("int4", torch.float32), ("fp8", torch.float32)],
    ids=str,
)
def test_both_algorithms_agree_with_the_definition(name: str, dtype: torch.dtype) -> None:
    spec = make_spec(dtype=dtype, **ODD)
    spec, x = pack(spec, name, name, make_inputs(spec, tokens=2, active=2))
    launches, expected = plan_launches(spec), defined(spec, x)
    with interpreted():
        assert_close(decode(launches, x), expected, dtype)
        assert_close(grouped(launches, x), expected, dtype)


@pytest.mark.parametrize("style", ["gpt-oss", "relu2-transposed", "st-moe"])
def test_every_style_is_packed_the_same(style: str) -> None:
    spec = dataclasses.replace(STYLES[style], **ODD)
    spec, x = pack(spec, "int4", "int8", make_inputs(spec, tokens=2, active=2))
    with interpreted():
        assert_close(grouped(plan_launches(spec), x, 32), defined(spec, x), spec.dtype)


def test_filled_up_columns_and_rows_add_nothing() -> None:
    """Columns are filled up with copies of weights: what they are multiplied by has to be zero."""
    spec = make_spec(RELU2, gated=False, hidden=33, intermediate=17)
    spec, x = pack(spec, "int4-g128", "fp8-b128", make_inputs(spec, tokens=2, active=1))
    with interpreted():
        assert_close(decode(plan_launches(spec), x), defined(spec, x), spec.dtype)


def test_quantize_needs_nothing_but_the_models_tensors() -> None:
    spec = make_spec(**ODD)
    schemes = Schemes(first=SCHEMES["mxfp4"], second=SCHEMES["int4-g32-zeros"])
    kernel, declined = choose(spec, "auto", schemes)
    assert (kernel.emitter, declined) == ("triton mxfp4 + int4-g32-zeros", ())
    x = make_inputs(spec, tokens=2, active=2)
    with interpreted():
        out = kernel.run(*tensors(x))
    packed, y = pack(spec, "mxfp4", "int4-g32-zeros", x)
    assert_close(out, defined(packed, y), spec.dtype)


def test_a_scheme_that_kernels_do_not_read_keeps_the_models_dtype() -> None:
    schemes = Schemes(first=SCHEMES["int3"], second=SCHEMES["int4"])
    kernel, (why,) = choose(make_spec(), "auto", schemes)
    assert kernel.emitter == "triton"
    assert "not int3" in why


def test_a_packed_matrix_of_another_size_is_named() -> None:
    spec, x = pack(make_spec(), "int4", "int4", make_inputs(make_spec(), tokens=2, active=2))
    x = dataclasses.replace(x, down=x.down[:, :-64].contiguous())
    with pytest.raises(InputError, match=r"^down is torch.uint8"):
        triton_emitter.emit(spec).run(*tensors(x))

"""Gate and up in two tensors, in Triton: the numbers of the same weights in one."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError, UnsupportedSpec

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from moecc.codegen import triton_emitter
from moecc.codegen.triton_inputs import Inputs
from moecc.codegen.triton_launches import plan_launches
from tests.codegen.triton_cases import (
    TOLERANCE,
    decode,
    grouped,
    make_inputs,
    make_spec,
    tensors,
)
from tests.codegen.triton_interpreter import interpreted


def join(spec: KernelSpec, x: Inputs) -> tuple[KernelSpec, Inputs]:
    """Put gate and up into one tensor."""
    assert x.up is not None
    gate_up = torch.cat([x.gate_up, x.up], dim=2 if spec.transposed else 1)
    return dataclasses.replace(spec, split=False), dataclasses.replace(x, gate_up=gate_up, up=None)


@pytest.mark.parametrize("transposed", [False, True], ids=["output-major", "input-major"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_split_is_bit_for_bit_concatenated(dtype: torch.dtype, transposed: bool) -> None:
    # Neither size is a multiple of a block, and I is not one of 8.
    spec = make_spec(
        split=True,
        bias=True,
        transposed=transposed,
        down_transposed=transposed,
        dtype=dtype,
        hidden=72,
        intermediate=43,
    )
    x = make_inputs(spec, tokens=5, active=2)
    joined, y = join(spec, x)
    apart, together = plan_launches(spec), plan_launches(joined)
    with interpreted():
        assert torch.equal(decode(apart, x), decode(together, y))
        assert torch.equal(grouped(apart, x, 16), grouped(together, y, 16))


def test_no_token_is_no_launch() -> None:
    spec = make_spec(split=True)
    x = make_inputs(spec, tokens=0, active=2)
    assert triton_emitter.emit(spec).run(*tensors(x)).shape == (0, spec.hidden)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda up: None, "up is missing", id="missing"),
        pytest.param(lambda up: up[:, :-1], r"up is .*\[4, 39, 48\]", id="a row short"),
        pytest.param(lambda up: up[1:], r"up is .*\[3, 40, 48\]", id="an expert short"),
        pytest.param(lambda up: up.mT.contiguous(), r"up is .*\[4, 48, 40\]", id="transposed"),
        pytest.param(lambda up: up.half(), r"up is torch.float16", id="another dtype"),
        pytest.param(lambda up: up.mT.contiguous().mT, r"up .*contiguous", id="a view"),
        pytest.param(
            lambda up: torch.cat([up, up], dim=1)[:, ::2], r"up .*contiguous", id="every other row"
        ),
    ],
)
def test_an_up_that_does_not_fit_is_named(
    change: Callable[[torch.Tensor | None], torch.Tensor | None], reason: str
) -> None:
    spec = make_spec(split=True)
    x = make_inputs(spec, tokens=3, active=2)
    x = dataclasses.replace(x, up=change(x.up))
    with pytest.raises(InputError, match=reason):
        triton_emitter.emit(spec).run(*tensors(x))


def test_an_up_is_not_for_one_tensor() -> None:
    spec = make_spec()
    x = make_inputs(spec, tokens=3, active=2)
    x = dataclasses.replace(x, up=x.gate_up[:, :40].contiguous())
    with pytest.raises(InputError, match="up is given"):
        triton_emitter.emit(spec).run(*tensors(x))


def test_a_whole_gate_up_is_not_half_of_one() -> None:
    spec = make_spec(split=True)
    x = make_inputs(spec, tokens=3, active=2)
    x = dataclasses.replace(x, gate_up=join(spec, x)[1].gate_up)
    with pytest.raises(InputError, match="gate_up is"):
        triton_emitter.emit(spec).run(*tensors(x))


@pytest.mark.parametrize("change", [{"interleaved": True}, {"gated": False}], ids=str)
def test_only_halves_can_be_split(change: dict[str, bool]) -> None:
    with pytest.raises(UnsupportedSpec, match="two tensors"):
        triton_emitter.emit(make_spec(split=True, **change))

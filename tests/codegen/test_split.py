"""Gate and up in two tensors, native and in the definition: the numbers of the same in one."""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moecc.codegen import reference
from moecc.codegen.activation import GATE, UP, apply
from moecc.codegen.native import emit as native
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.runtime.errors import InputError, UnsupportedSpec

EMITTERS = {"native": native.emit, "torch": reference.emit}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Tensors = list[torch.Tensor | None]
"""What a kernel is called with: hidden, ids, weights, gate_up, down, two biases, up."""
GATE_UP, UP_AT = 3, 7

needs_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="native kernels are built on Linux"
)


def make_spec(**changes: object) -> KernelSpec:
    # 75 is no multiple of a panel, a line or a vector.
    spec = KernelSpec(
        hidden=130, intermediate=75, experts=5, dtype=torch.float32, gated=True,
        activation=apply("mul", apply("silu", GATE), UP), interleaved=False, transposed=False,
        down_transposed=False, bias=False, split=True, device="cpu",
    )  # fmt: skip
    return replace(spec, **changes)


def make_tensors(spec: KernelSpec, tokens: int, active: int = 2) -> Tensors:
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(spec.dtype)

    first, second = (spec.intermediate, spec.hidden), (spec.hidden, spec.intermediate)
    if spec.transposed:
        first = first[::-1]
    if spec.down_transposed:
        second = second[::-1]
    ids = torch.rand(tokens, spec.experts, generator=generator).topk(active).indices
    weights = torch.rand(tokens, active, generator=generator)
    biases: Tensors = [None, None]
    if spec.bias:
        biases = [randn(spec.experts, spec.rows), randn(spec.experts, spec.hidden)]
    gate, down, up = (randn(spec.experts, *shape) for shape in (first, second, first))
    return [randn(tokens, spec.hidden), ids, weights, gate, down, *biases, up]


def run_joined(emit: Callable[[KernelSpec], Kernel], spec: KernelSpec, x: Tensors) -> torch.Tensor:
    """Run the kernel for one tensor on gate and up put together."""
    gate, up = x[GATE_UP], x[UP_AT]
    assert gate is not None
    assert up is not None
    gate_up = torch.cat([gate, up], dim=2 if spec.transposed else 1)
    return emit(replace(spec, split=False)).run(*x[:GATE_UP], gate_up, *x[GATE_UP + 1 : UP_AT])


@needs_linux
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["output-major", "input-major"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("emitter", EMITTERS)
def test_split_is_bit_for_bit_concatenated(
    emitter: str, dtype: torch.dtype, transposed: bool, bias: bool
) -> None:
    layout = {"transposed": transposed, "down_transposed": transposed}
    spec, emit = make_spec(dtype=dtype, bias=bias, **layout), EMITTERS[emitter]
    for tokens in (0, 1, 7, 140):  # 140: an expert has more tokens than a chunk
        x = make_tensors(spec, tokens)
        out = emit(spec).run(*x)
        assert out.shape == (tokens, spec.hidden)
        assert out.dtype == dtype
        assert torch.equal(out, run_joined(emit, spec, x))


@needs_linux
@pytest.mark.parametrize("transposed", [False, True], ids=["output-major", "input-major"])
def test_reads_gate_and_up_each_with_its_own_strides(transposed: bool) -> None:
    spec = make_spec(dtype=torch.bfloat16, transposed=transposed, down_transposed=transposed)
    x = make_tensors(spec, tokens=60)
    expected = run_joined(native.emit, spec, x)
    gate, up = x[GATE_UP], x[UP_AT]
    assert gate is not None
    assert up is not None
    experts, rows, columns = up.shape
    # Every other expert and every third row, from an odd element on; no two strides are equal.
    apart = torch.full((2 * experts, 3 * rows, columns + 7), torch.nan, dtype=spec.dtype)
    strided = apart[1::2, 2::3, 3 : 3 + columns]
    strided.copy_(up)
    wide = torch.full((experts, rows + 1, columns + 2), torch.nan, dtype=spec.dtype)
    wide[:, 1:, 2:] = gate
    x[GATE_UP], x[UP_AT] = wide[:, 1:, 2:], strided
    assert torch.equal(native.emit(spec).run(*x), expected)


@needs_linux
@pytest.mark.parametrize("transposed", [False, True], ids=["output-major", "input-major"])
def test_reads_the_halves_of_one_tensor_as_two(transposed: bool) -> None:
    spec = make_spec(transposed=transposed, down_transposed=transposed)
    x = make_tensors(spec, tokens=9)
    expected = run_joined(native.emit, spec, x)
    dim = 2 if transposed else 1
    x[GATE_UP], x[UP_AT] = torch.cat([x[GATE_UP], x[UP_AT]], dim=dim).chunk(2, dim)
    assert torch.equal(native.emit(spec).run(*x), expected)


@needs_linux
def test_gate_and_up_may_be_one_tensor() -> None:
    spec = make_spec()
    x = make_tensors(spec, tokens=9)
    x[UP_AT] = x[GATE_UP]
    assert torch.equal(native.emit(spec).run(*x), run_joined(native.emit, spec, x))


@needs_linux
@pytest.mark.parametrize("place", [GATE_UP, UP_AT], ids=["gate", "up"])
def test_nan_in_one_expert_reaches_its_own_tokens(place: int) -> None:
    spec = make_spec()
    x = make_tensors(spec, tokens=40)
    clean = native.emit(spec).run(*x)
    weight, ids = x[place], x[1]
    assert weight is not None
    assert ids is not None
    weight[3, 70] = torch.nan
    out = native.emit(spec).run(*x)
    touched = (ids == 3).any(dim=1)
    assert out[touched].isnan().all()
    assert torch.equal(out[~touched], clean[~touched])


@needs_linux
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda up: None, "up is missing; expected", id="missing"),
        pytest.param(lambda up: up[:, 1:], r"up is .*\[5, 74, 130\].*expected", id="a row short"),
        pytest.param(lambda up: up[1:], r"up is .*\[4, 75, 130\].*expected", id="an expert short"),
        pytest.param(lambda up: up.mT.contiguous(), r"up is .*\[5, 130, 75\]", id="transposed"),
        pytest.param(lambda up: up.half(), "up is torch.float16 .*expected", id="another dtype"),
        pytest.param(lambda up: up.to("meta"), "up is .*on meta; expected", id="no data"),
        pytest.param(lambda up: up.mT.contiguous().mT, "up .*call .contiguous", id="columns"),
    ],
)
def test_an_up_that_does_not_fit_is_named(
    change: Callable[[torch.Tensor | None], torch.Tensor | None], reason: str
) -> None:
    spec = make_spec()
    x = make_tensors(spec, tokens=3)
    x[UP_AT] = change(x[UP_AT])
    with pytest.raises(InputError, match=reason):
        native.emit(spec).run(*x)


@needs_linux
def test_an_up_is_not_for_one_tensor() -> None:
    spec = make_spec()
    x = make_tensors(spec, tokens=3)
    x[GATE_UP] = torch.cat([x[GATE_UP], x[UP_AT]], dim=1)
    with pytest.raises(InputError, match="up was given"):
        native.emit(replace(spec, split=False)).run(*x)
    with pytest.raises(
        InputError, match=r"gate_up is .*\[5, 150, 130\].*expected .*\[5, 75, 130\]"
    ):
        native.emit(spec).run(*x)


@pytest.mark.parametrize("change", [{"interleaved": True}, {"gated": False}], ids=str)
def test_only_halves_can_be_split(change: dict[str, bool]) -> None:
    with pytest.raises(UnsupportedSpec, match="two tensors"):
        native.write(make_spec(**change))


def test_one_source_serves_one_tensor_and_two() -> None:
    assert native.write(make_spec()) == native.write(make_spec(split=False))

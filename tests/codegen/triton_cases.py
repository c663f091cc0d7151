"""Specs and tensors that the tests of the Triton emitter share."""

import dataclasses
import math

import torch

from moecc.codegen import reference, triton_emitter
from moecc.codegen.activation import GATE, LEARNED, UP, Expr, X, apply, constant
from moecc.codegen.spec import KernelSpec
from moecc.codegen.triton_inputs import Inputs
from moecc.codegen.triton_launches import Launches
from moecc.codegen.triton_tiles import PERSISTENT_M

SWIGLU = apply("mul", apply("silu", GATE), UP)
GEGLU = apply("mul", apply("gelu_tanh", GATE), UP)
RELU2 = apply("square", apply("relu", X))
CLAMPED = apply("min", GATE, constant(7.0))
GPT_OSS = apply(
    "mul",
    apply("add", apply("min", apply("max", UP, constant(-7.0)), constant(7.0)), constant(1.0)),
    apply("mul", CLAMPED, apply("sigmoid", apply("mul", CLAMPED, constant(1.702)))),
)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Of the norm. Half types round twice: between the products and before the sum over k."""


def make_spec(activation: Expr = SWIGLU, **changes: object) -> KernelSpec:
    spec = KernelSpec(
        hidden=48,
        intermediate=40,
        experts=4,
        dtype=torch.float32,
        activation=activation,
        gated=True,
        interleaved=False,
        transposed=False,
        down_transposed=False,
        bias=False,
        device="cuda",
    )
    return dataclasses.replace(spec, **changes)


INPUT_MAJOR = {"transposed": True, "down_transposed": True}
STYLES = {
    "swiglu": make_spec(),
    "gpt-oss": make_spec(GPT_OSS, interleaved=True, bias=True, **INPUT_MAJOR),
    "relu2": make_spec(RELU2, gated=False),
    "geglu": make_spec(GEGLU, **INPUT_MAJOR),
    "interleaved": make_spec(interleaved=True, bias=True),
    "split": make_spec(split=True),
    "split-transposed": make_spec(GEGLU, split=True, bias=True, **INPUT_MAJOR),
    "relu2-transposed": make_spec(RELU2, gated=False, bias=True, **INPUT_MAJOR),
    "dbrx": make_spec(split=True, down_transposed=True),
    "first-transposed": make_spec(GEGLU, transposed=True, bias=True),
    "st-moe": make_spec(apply("mul", apply("mul", apply("gelu", GATE), UP), LEARNED), bias=True),
}


def make_inputs(
    spec: KernelSpec, tokens: int, active: int, seed: int = 0, device: str = "cpu"
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, spec.dtype)

    rows = spec.intermediate if spec.split else spec.rows
    first, second = (rows, spec.hidden), (spec.hidden, spec.intermediate)
    if spec.transposed:
        first = first[::-1]
    if spec.down_transposed:
        second = second[::-1]
    scores = torch.rand(tokens, spec.experts, generator=generator)
    return Inputs(
        hidden=randn(tokens, spec.hidden),
        ids=scores.topk(active).indices.to(device),
        weights=torch.rand(tokens, active, generator=generator).to(device),
        gate_up=randn(spec.experts, *first, scale=2 / math.sqrt(spec.hidden)),
        down=randn(spec.experts, *second, scale=1 / math.sqrt(spec.intermediate)),
        gate_up_bias=randn(spec.experts, spec.rows) if spec.bias else None,
        down_bias=randn(spec.experts, spec.hidden) if spec.bias else None,
        up=randn(spec.experts, *first, scale=2 / math.sqrt(spec.hidden)) if spec.split else None,
        learned=randn(spec.experts, spec.intermediate) if spec.learned else None,
    )


def tensors(x: Inputs) -> list[torch.Tensor | None]:
    """List what `ExpertsFn` takes."""
    others = ("slots", "shared", "shared_scale")
    return [getattr(x, one.name) for one in dataclasses.fields(x) if one.name not in others]


def decode(launches: Launches, x: Inputs) -> torch.Tensor:
    """Run the decode kernels whatever T is."""
    out = torch.full_like(x.hidden, math.nan)
    triton_emitter.run_decode(launches, x, out)
    return out


def grouped(launches: Launches, x: Inputs, block_m: int = 16) -> torch.Tensor:
    """Run the grouped kernels whatever T is."""
    out = torch.full_like(x.hidden, math.nan)
    triton_emitter.run_grouped(launches, x, out, block_m)
    return out


def persistent(launches: Launches, x: Inputs) -> torch.Tensor:
    """Run the persistent kernels whatever T is."""
    out = torch.full_like(x.hidden, math.nan)
    triton_emitter.run_grouped(launches, x, out, PERSISTENT_M, persistent=True)
    return out


def expect(spec: KernelSpec, x: Inputs) -> torch.Tensor:
    """The definition, in float32 from the same rounded weights."""
    wide = [t.float() if t is not None and t.is_floating_point() else t for t in tensors(x)]
    return reference.emit(dataclasses.replace(spec, dtype=torch.float32)).run(*wide)


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    assert out.shape == expected.shape
    error = (out.float() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"

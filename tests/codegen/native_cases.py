"""Specs and tensors that the tests of the native emitter share."""

from dataclasses import replace

import torch

from moecc.codegen.activation import GATE, LEARNED, UP, Expr, X, apply, constant
from moecc.codegen.reference import experts_torch
from moecc.codegen.spec import KernelSpec

_CLAMPED = apply("min", GATE, constant(7.0))
_GPT_OSS = apply(
    "mul",
    apply("add", apply("max", apply("min", UP, constant(7.0)), constant(-7.0)), constant(1.0)),
    apply("mul", _CLAMPED, apply("sigmoid", apply("mul", _CLAMPED, constant(1.702)))),
)
INPUT_MAJOR = {"transposed": True, "down_transposed": True}
STYLES: dict[str, tuple[Expr, dict[str, bool]]] = {
    "silu": (apply("mul", apply("silu", GATE), UP), {}),
    "gpt-oss": (_GPT_OSS, {"interleaved": True, "bias": True, **INPUT_MAJOR}),
    "relu2": (apply("square", apply("relu", X)), {"gated": False}),
    "gelu_tanh": (apply("mul", apply("gelu_tanh", GATE), UP), {"bias": True}),
    "dbrx": (apply("mul", apply("silu", GATE), UP), {"split": True, "down_transposed": True}),
    "first-transposed": (apply("mul", apply("silu", GATE), UP), {"transposed": True, "bias": True}),
    "split": (apply("mul", apply("gelu_tanh", GATE), UP), {"bias": True, "split": True}),
    "st-moe": (apply("mul", apply("mul", apply("gelu", GATE), UP), LEARNED), {"bias": True}),
    "swish": (apply("mul", X, apply("sigmoid", apply("mul", LEARNED, X))), {"gated": False}),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2**-11}
"""Of the terms' norm. bfloat16 may round twice: the activated values, then the output."""


def make_spec(style: str, dtype: torch.dtype, experts: int = 4, h: int = 40, i: int = 24):
    activation, flags = STYLES[style]
    spec = KernelSpec(
        hidden=h, intermediate=i, experts=experts, dtype=dtype, activation=activation, gated=True,
        interleaved=False, transposed=False, down_transposed=False, bias=False, device="cpu",
    )  # fmt: skip
    return replace(spec, **flags)


def make_experts(spec: KernelSpec) -> list[torch.Tensor | None]:
    first = torch.randn(spec.experts, spec.rows, spec.hidden) / spec.hidden**0.5
    second = torch.randn(spec.experts, spec.hidden, spec.intermediate) / spec.intermediate**0.5
    if spec.transposed:
        first = first.mT.contiguous()
    if spec.down_transposed:
        second = second.mT.contiguous()
    biases, up = [None, None], None
    if spec.bias:
        biases = [torch.randn(spec.experts, spec.rows), torch.randn(spec.experts, spec.hidden)]
    if spec.split:
        first, up = first.chunk(2, dim=2 if spec.transposed else 1)
    learned = torch.randn(spec.experts, spec.intermediate) if spec.learned else None
    return [t if t is None else t.to(spec.dtype) for t in (first, second, *biases, up, learned)]


def make_batch(spec: KernelSpec, tokens: int, active: int) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(tokens, spec.hidden).to(spec.dtype)
    weights, ids = torch.rand(tokens, spec.experts).topk(active)
    return hidden, ids, weights / weights.sum(-1, keepdim=True)


def definition(spec: KernelSpec, batch, experts) -> torch.Tensor:
    hidden, ids, weights = batch
    wide = [None if t is None else t.double() for t in experts]
    spec = replace(spec, dtype=torch.float64)
    return experts_torch(spec, hidden.double(), ids, weights.double(), *wide)


def terms(spec: KernelSpec, batch, experts) -> torch.Tensor:
    """Add the absolute values of what the definition adds: what rounding errors are relative to."""
    first, second, bias, second_bias, *others = experts
    second_bias = second_bias if bias is None else second_bias.abs()
    absolute = [first, second.abs(), bias, second_bias, *others]
    spec = replace(spec, activation=apply("abs", spec.activation))
    return definition(spec, batch, absolute)


def rounding(spec: KernelSpec, batch, experts) -> float:
    """Bound the norm of a kernel's error: that of its sums, and of what the activation is given.

    A first product that cancels out loses float32 digits before the activation.
    """
    hidden, ids, weights = batch
    absolute = [one if one is None else one.abs() for one in experts]
    inner = definition(spec, (hidden.abs(), ids, weights), absolute).norm()
    return float(TOLERANCE[spec.dtype] * terms(spec, batch, experts).norm() + 2**-24 * inner)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert (got.double() - want).norm() <= tolerance * want.norm()

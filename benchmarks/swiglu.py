"""Make the spec of a layer with SwiGLU experts, which is what benchmarks time."""

from collections.abc import Mapping
from typing import Any

import torch

from moecc.codegen.activation import GATE, UP, apply
from moecc.codegen.spec import KernelSpec


def swiglu_spec(
    shape: Mapping[str, int], dtype: torch.dtype, device: str = "cpu", **more: Any
) -> KernelSpec:
    """Make it for `hidden`, `intermediate` and `experts` of a shape; gate rows before up rows."""
    sizes = {name: shape[name] for name in ("hidden", "intermediate", "experts")}
    return KernelSpec(
        **sizes,
        dtype=dtype,
        activation=apply("mul", apply("silu", GATE), UP),
        gated=True,
        interleaved=False,
        transposed=False,
        down_transposed=False,
        bias=False,
        device=device,
        **more,
    )

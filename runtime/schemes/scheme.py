"""Say how weights are quantized."""

from dataclasses import dataclass

import torch

from moecc.runtime.errors import InputError

ACTIVATION_BLOCK = 64
"""Inputs that share a scale when rows of weights have one scale each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A weight-only format: each weight is a code, and groups of them share a scale."""

    name: str
    """`int8`, `int4` or `mxfp4`."""
    bits: int
    """Of a code."""
    scale: torch.dtype
    """Of stored scales; uint8 are powers of two, 127 standing for 1 (e8m0)."""
    group: int | None = None
    """Weights along a row that share a scale; None: the whole row."""
    zeros: bool = False
    """Each group also stores the weight that its code 0 stands for."""

    @property
    def block(self) -> int:
        """Inputs that share a scale when they are quantized to multiply these weights."""
        return self.group or ACTIVATION_BLOCK

    @property
    def bits_per_weight(self) -> float:
        """Storage, scales counted, for long rows."""
        shared = self.scale.itemsize * 8 * (2 if self.zeros else 1)
        return self.bits + (shared / self.group if self.group else 0)

    def __str__(self) -> str:
        """Name the scheme as options do: `int4-g64-zeros`."""
        group = f"-g{self.group}" if self.name == "int4" else ""
        return f"{self.name}{group}{'-zeros' if self.zeros else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """One matrix [N, K] in a scheme, before codes are packed."""

    codes: torch.Tensor
    """[N, K] int8 for `int8`, else uint8."""
    scales: torch.Tensor
    """[N, K / group], or [N, 1] for whole rows; in the scheme's dtype."""
    zeros: torch.Tensor | None = None
    """As scales: the weight that code 0 stands for."""


def int4(group: int = 32, *, zeros: bool = False) -> Scheme:
    """Give the 4-bit scheme of some group size; raises `InputError` for one that kernels lack."""
    if group not in (32, 64, 128):
        raise InputError(f"int4 groups have 32, 64 or 128 weights, not {group}")
    return Scheme(name="int4", bits=4, scale=torch.float16, group=group, zeros=zeros)


INT8 = Scheme(name="int8", bits=8, scale=torch.float32)
MXFP4 = Scheme(name="mxfp4", bits=4, scale=torch.uint8, group=32)
SCHEMES = {
    "int4": int4(),
    **{
        str(one): one
        for one in (INT8, MXFP4, *(int4(g, zeros=z) for g in (32, 64, 128) for z in (False, True)))
    },
}
"""Every scheme by its name; `int4` alone has groups of 32."""

"""Say how weights are quantized."""

from dataclasses import dataclass
from functools import partial

import torch

from moecc.runtime.errors import InputError

ACTIVATION_BLOCK = 64
"""Inputs that share a scale when rows of weights have one scale each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A weight-only format: each weight is a code, and groups of them share a scale."""

    name: str
    """`int8`, `fp8`, `int4`, `mxfp4`, `int3` or `int2`."""
    bits: int
    """Of a code."""
    scale: torch.dtype
    """Of stored scales; uint8 are powers of two, 127 standing for 1 (e8m0)."""
    group: int | None = None
    """Weights along a row that share a scale; None: the whole row."""
    rows: int = 1
    """Rows that share a scale with each other."""
    zeros: bool = False
    """Each group also stores the weight that its code 0 stands for."""
    points: bool = False
    """Or instead of that weight the code, maybe beyond the others, that stands for 0."""

    @property
    def block(self) -> int:
        """Inputs that share a scale when they are quantized to multiply these weights."""
        return self.group or ACTIVATION_BLOCK

    @property
    def rounds_inputs(self) -> bool:
        """Kernels round inputs to 8 bits and multiply integers; e4m3 codes are no integers."""
        return self.name != "fp8"

    @property
    def bits_per_weight(self) -> float:
        """Storage, scales counted, for long rows."""
        shared = self.scale.itemsize * 8 * (2 if self.zeros else 1)
        return self.bits + (shared / self.group / self.rows if self.group else 0)

    def __str__(self) -> str:
        """Name the scheme as options do: `int4-g64-zeros`."""
        group = f"-g{self.group}" if self.group and self.scale == torch.float16 else ""
        if self.rows > 1:
            group = f"-b{self.rows}"
        zeros = "-points" if self.points else "-zeros" if self.zeros else ""
        return f"{self.name}{group}{zeros}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schemes:
    """The schemes of a block: one for each of its two products."""

    first: Scheme
    """Of gate and up."""
    second: Scheme
    """Of down."""

    def __str__(self) -> str:
        """Name them as one if they are the same: `int4-g32`, else `int4-g32 + int8`."""
        same = self.first == self.second
        return str(self.first) if same else f"{self.first} + {self.second}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """One matrix [N, K] in a scheme, before codes are packed."""

    codes: torch.Tensor
    """[N, K] int8 for `int8`, else uint8."""
    scales: torch.Tensor
    """[N / rows, K / group], or [N, 1] for whole rows; in the scheme's dtype."""
    zeros: torch.Tensor | None = None
    """As scales: the weight that code 0 stands for, or with points the code that stands for 0."""


_GROUPED = {"int2": 2, "int3": 3, "int4": 4}
_SIZES = (32, 64, 128)


def grouped(name: str, group: int = 32, *, zeros: bool = False, points: bool = False) -> Scheme:
    """Give a scheme of `int2`, `int3` or `int4`; raises `InputError` for a size kernels lack."""
    if group not in _SIZES:
        raise InputError(f"{name} groups have 32, 64 or 128 weights, not {group}")
    return Scheme(
        name=name,
        bits=_GROUPED[name],
        scale=torch.float16,
        group=group,
        zeros=zeros or points,
        points=points,
    )


int4 = partial(grouped, "int4")
INT8 = Scheme(name="int8", bits=8, scale=torch.float32)
INT8_GROUPS = Scheme(name="int8", bits=8, scale=torch.float16, group=32)
FP8 = Scheme(name="fp8", bits=8, scale=torch.float32)
FP8_BLOCKS = Scheme(name="fp8", bits=8, scale=torch.float32, group=128, rows=128)
MXFP4 = Scheme(name="mxfp4", bits=4, scale=torch.uint8, group=32)
SCHEMES = {
    **{name: grouped(name) for name in _GROUPED},
    **{str(one): one for one in (INT8, INT8_GROUPS, FP8, FP8_BLOCKS, MXFP4)},
    **{
        str(one): one
        for one in (
            grouped(name, size, zeros=zeros)
            for name in reversed(_GROUPED)
            for size in _SIZES
            for zeros in (False, True)
        )
    },
    **{str(one): one for one in (int4(size, points=True) for size in _SIZES)},
}
"""Every scheme by its name; `int4` alone has groups of 32, and so have `int3` and `int2`.

Points are how GPTQ and AWQ store zeros, and groups of int8 are Q8_0 of GGUF: moecc keeps the codes
of such checkpoints. For weights that are to be rounded zeros are better. int3 and int2 are
experimental: for copies that draft, which a better one checks."""

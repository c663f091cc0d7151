"""Round matrices as moecc's schemes and other libraries' formats do, each from its own code.

Peers are optional: `pip install hqq gguf torchao`. A peer that is not there is left out by name.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from moecc.runtime.schemes import packing
from moecc.runtime.schemes.scheme import SCHEMES, Scheme

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""From a float32 matrix [N, K] to what its codes stand for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to store weights."""

    name: str
    family: str
    """`moecc`, `nearest` (moecc's formats, plain rounding), or whose it is."""
    codes: int
    """Bits of one."""
    shared: float
    """Bits of what a group, or a row, has in common: scale and zero."""
    group: int | None
    """Weights of one; None: whole rows."""
    rounded: Rounding

    def bits(self, columns: int) -> float:
        """Give those per weight of rows of so many columns, whose last group may be short."""
        return bits(self.codes, self.shared, self.group, columns)


def bits(codes: int, shared: float, group: int | None, columns: int) -> float:
    """Give bits per weight of codes and what their groups share."""
    return codes + shared * (math.ceil(columns / group) if group else 1) / columns


def scheme_bits(scheme: Scheme, columns: int) -> float:
    """Give bits per weight of a scheme of ours."""
    return bits(scheme.bits, _shared(scheme), scheme.group, columns)


def _shared(scheme: Scheme) -> float:
    return scheme.scale.itemsize * 8 * (2 if scheme.zeros else 1) / scheme.rows


def contenders() -> Iterator[Contender]:
    """Give moecc's schemes, the same rounded to nearest, and the peers that are there."""
    yield from _own(one for one in SCHEMES.values() if one.bits >= 4)
    if find_spec("gguf"):
        for kind, codes, shared in (
            ("Q8_0", 8, 16),
            ("Q4_0", 4, 16),
            ("Q4_1", 4, 32),
            ("MXFP4", 4, 8),
        ):
            yield Contender(
                name=kind, family="llama.cpp", codes=codes, shared=shared, group=32,
                rounded=partial(_gguf, kind),
            )  # fmt: skip
    if find_spec("hqq"):
        for codes, group in ((8, 64), (4, 32), (4, 64), (4, 128), (3, 64), (2, 64)):
            yield Contender(
                name=f"{codes} g{group}", family="hqq", codes=codes, shared=32, group=group,
                rounded=partial(_hqq, codes, group),
            )  # fmt: skip
    if find_spec("torchao"):
        for group in (32, 64, 128):
            yield Contender(
                name=f"int4 g{group}", family="torchao", codes=4, shared=16, group=group,
                rounded=partial(_torchao, group),
            )  # fmt: skip
    yield from _own(one for one in SCHEMES.values() if one.bits < 4 and one.group == 64)


def _own(schemes: Iterable[Scheme]) -> Iterator[Contender]:
    """Give schemes as moecc fits them, and rounded to nearest where that differs."""
    for scheme in dict.fromkeys(schemes):
        for family, quantize in (("moecc", packing.quantize), ("nearest", packing.nearest)):
            if family == "moecc" or scheme.bits < 8:
                yield Contender(
                    name=str(scheme), family=family, codes=scheme.bits, shared=_shared(scheme),
                    group=scheme.group, rounded=partial(_ours, quantize, scheme),
                )  # fmt: skip


def missing() -> list[str]:
    """Name the peers that are not installed."""
    return [name for name in ("gguf", "hqq", "torchao") if not find_spec(name)]


def _ours(quantize: Any, scheme: Scheme, weight: torch.Tensor) -> torch.Tensor:
    return packing.dequantize(quantize(weight, scheme), scheme)[:, : weight.shape[1]]


def _filled(weight: torch.Tensor, block: int) -> torch.Tensor:
    """Fill rows up to whole groups with what they end on, as moecc does for its own."""
    columns = weight.shape[1]
    whole = columns // block * block
    column = torch.arange(-(-columns // block) * block)
    column[columns:] = whole + (column[columns:] - whole) % max(columns - whole, 1)
    return weight[:, column].contiguous()


def _gguf(kind: str, weight: torch.Tensor) -> torch.Tensor:
    from gguf import GGMLQuantizationType, quants

    codes = quants.quantize(_filled(weight, 32).numpy(), GGMLQuantizationType[kind])
    known = torch.from_numpy(quants.dequantize(codes, GGMLQuantizationType[kind]))
    return known[:, : weight.shape[1]]


def _hqq(bits: int, group: int, weight: torch.Tensor) -> torch.Tensor:
    from hqq.core.quantize import Quantizer

    filled = _filled(weight, group)
    codes, state = Quantizer.quantize(
        filled, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
    )
    return Quantizer.dequantize(codes, state).reshape(filled.shape)[:, : weight.shape[1]]


def _torchao(group: int, weight: torch.Tensor) -> torch.Tensor:
    """Use the configuration that runs on every CPU; its weights keep their codes in int8."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    filled = _filled(weight, group)
    linear = torch.nn.Linear(filled.shape[1], filled.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(filled, requires_grad=False)
    quantize_(linear, IntxWeightOnlyConfig(torch.int4, PerGroup(group)))
    known: Any = linear.weight
    return known.dequantize()[:, : weight.shape[1]]

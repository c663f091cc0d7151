"""AWQ as AutoAWQ saves it (version gemm): 4-bit weights, packed along their output.

    qweight  int32 [K, N / 8]       eight columns of W.T in a word
    qzeros   int32 [K / group, N / 8]
    scales   float16 [K / group, N]

    W[n, k] = (q[k, n] - zero[k / group, n]) * scale[k / group, n]

The four bits from 4i on belong to column 0, 2, 4, 6, 1, 3, 5, 7 of eight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moecc.checkpoint.files import Tensor
from moecc.checkpoint.formats.bits import (
    check_dtype,
    filled,
    halves,
    point_scheme,
    regrouped,
    unpack,
)
from moecc.runtime.errors import InputError
from moecc.runtime.schemes.scheme import Quantized, Scheme

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight columns is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """AWQ with groups of one size."""

    bits: int
    group: int
    """-1: whole rows."""
    version: str
    method: ClassVar[str] = "awq"
    weight_suffix: ClassVar[str] = ".weight"
    suffixes: ClassVar[Mapping[str, str]] = {
        "codes": ".qweight", "zeros": ".qzeros", "scales": ".scales",
    }  # fmt: skip
    optional: ClassVar[frozenset[str]] = frozenset()
    transposed: ClassVar[bool] = False

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "Awq":
        """Read a checkpoint's `quantization_config`."""
        return Awq(
            bits=int(settings.get("bits", settings.get("w_bit", 4))),
            group=int(settings.get("group_size", settings.get("q_group_size", 128))),
            version=str(settings.get("version", "gemm")).lower(),
        )

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Give [N, K]."""
        check_dtype(stored, torch.int32, "codes", "zeros")
        if self.bits != 4 or self.version != "gemm":
            raise InputError(
                f"AWQ of {self.bits} bits, version {self.version!r}, is not read; 4 bits of "
                "version 'gemm' are"
            )
        columns, words = stored["codes"].shape
        groups = 1 if self.group == -1 else -(-columns // self.group)
        scales, zeros = stored["scales"].shape, stored["zeros"].shape
        if scales != (groups, words * 8) or zeros != (groups, words):
            raise InputError(
                f"scales {[*scales]} and zeros {[*zeros]} do not fit {words * 8} rows of "
                f"{columns} in groups of {self.group}"
            )
        return words * 8, columns

    def scheme(self) -> Scheme:
        """Give int4 with points."""
        return point_scheme(self.group, symmetric=False)

    def quantized(self, read: Mapping[str, torch.Tensor]) -> Quantized:
        """Turn it to rows."""
        scheme, codes = self.scheme(), _columns(read["codes"]).T
        points = _columns(read["zeros"]).T.to(torch.float16)
        return Quantized(
            codes=filled(codes.to(torch.uint8), scheme.block),
            scales=regrouped(halves(read["scales"]).T, self.group, scheme, codes.shape[1]),
            zeros=regrouped(points, self.group, scheme, codes.shape[1]),
        )

    def weight(self, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Dequantize."""
        codes = _columns(read["codes"])
        size = len(codes) if self.group == -1 else self.group
        groups = torch.arange(len(codes)) // size
        zeros, scales = _columns(read["zeros"]), read["scales"].float()
        return ((codes - zeros[groups]) * scales[groups]).T


def _columns(words: torch.Tensor) -> torch.Tensor:
    """Take words apart along their last dimension, columns in order."""
    eights = unpack(words, 4, 1).reshape(len(words), -1, 8)
    return eights[:, :, _PLACES].flatten(1)

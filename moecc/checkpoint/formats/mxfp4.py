"""MXFP4 as GPT-OSS has it: `X_blocks` uint8 [E, N, K / 32, 16] and `X_scales` uint8 [E, N, K / 32].

A byte holds two e2m1 codes, the even column in its low half; scales are powers of two (e8m0). The
model's own weight is the transposed one, [E, K, N].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moecc.checkpoint.files import Tensor
from moecc.checkpoint.formats.bits import check_dtype
from moecc.runtime.errors import InputError
from moecc.runtime.schemes.packing import dequantize
from moecc.runtime.schemes.scheme import MXFP4, Quantized, Scheme

_GROUP_BYTES = 16
_NAN = 255
"""The one e8m0 code that is no power of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4:
    """Of a whole checkpoint: nothing varies."""

    method: ClassVar[str] = "mxfp4"
    weight_suffix: ClassVar[str] = ""
    suffixes: ClassVar[Mapping[str, str]] = {"codes": "_blocks", "scales": "_scales"}
    optional: ClassVar[frozenset[str]] = frozenset()
    transposed: ClassVar[bool] = True

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "Mxfp4":
        """Read a checkpoint's `quantization_config`."""
        return Mxfp4()

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Give [E, N, K] or [N, K]."""
        check_dtype(stored, torch.uint8)
        codes, scales = stored["codes"].shape, stored["scales"].shape
        if len(codes) < 3 or codes[-1] != _GROUP_BYTES or codes[:-1] != scales:
            raise InputError(
                f"blocks {[*codes]} and scales {[*scales]} are not [.., N, K / 32, 16] and "
                "[.., N, K / 32]"
            )
        return (*scales[:-1], scales[-1] * _GROUP_BYTES * 2)

    def scheme(self) -> Scheme:
        """Give mxfp4."""
        return MXFP4

    def quantized(self, read: Mapping[str, torch.Tensor]) -> Quantized:
        """Take the halves of bytes apart."""
        blocks, scales = read["codes"], read["scales"]
        if (scales == _NAN).any():
            raise InputError("its scales hold NaN")
        codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-3)
        return Quantized(codes=codes, scales=scales)

    def weight(self, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Dequantize."""
        return dequantize(self.quantized(read), MXFP4)

"""GGUF's blocks of 32 weights, [.., K / 32, bytes] along a row, as ggml defines them.

    Q8_0    float16 scale, 32 int8               w = code * scale              int8-g32
    Q4_0    float16 scale, 32 x 4 bits           w = (code - 8) * scale        int4-g32
    Q4_1    float16 scale and zero, 32 x 4 bits  w = code * scale + zero       int4-g32-zeros
    MXFP4   e8m0 scale, 32 x 4 bits              w = e2m1(code) * 2^(e - 127)  mxfp4

Of 16 bytes the low halves are the first 16 weights, the high halves the others. Other types, those
with blocks of 256 (Q4_K and the like) among them, are dequantized by the `gguf` package, and no
kernel of moecc reads them.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moecc.checkpoint.files import Tensor
from moecc.runtime.errors import InputError
from moecc.runtime.schemes.scheme import INT8_GROUPS, MXFP4, Quantized, Scheme, int4

_SCHEMES = {"Q8_0": INT8_GROUPS, "Q4_0": int4(), "Q4_1": int4(zeros=True), "MXFP4": MXFP4}
_GROUP = 32
_NAN = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """Tensors of one type; a file may have several."""

    kind: str
    method: ClassVar[str] = "gguf"
    weight_suffix: ClassVar[str] = ""
    suffixes: ClassVar[Mapping[str, str]] = {"codes": ""}
    optional: ClassVar[frozenset[str]] = frozenset()
    transposed: ClassVar[bool] = False

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Give [.., K] of bytes [.., K / weights * bytes of a block]."""
        gguf: Any = importlib.import_module("gguf")
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        *more, row = stored["codes"].shape
        return (*more, row // size * weights)

    def scheme(self) -> Scheme:
        """Give the scheme of the same blocks."""
        if self.kind not in _SCHEMES:
            raise InputError(f"kernels read {list(_SCHEMES)} of GGUF, not {self.kind}")
        return _SCHEMES[self.kind]

    def quantized(self, read: Mapping[str, torch.Tensor]) -> Quantized:
        """Take blocks apart."""
        scheme, rows = self.scheme(), read["codes"]
        heads = scheme.scale.itemsize * (2 if scheme.zeros else 1)
        blocks = rows.reshape(len(rows), -1, heads + _GROUP * scheme.bits // 8)
        head = blocks[:, :, :heads].contiguous().view(scheme.scale)
        bad = head == _NAN if scheme.scale == torch.uint8 else ~head.isfinite()
        if bad.any():
            raise InputError("its scales hold inf or NaN")
        codes = blocks[:, :, heads:]
        if scheme.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=2)
        codes = codes.reshape(len(rows), -1).contiguous()
        return Quantized(
            codes=codes.view(torch.int8) if scheme.bits == 8 else codes,
            scales=head[:, :, 0].contiguous(),
            zeros=head[:, :, 1].contiguous() if scheme.zeros else None,
        )

    def weight(self, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Dequantize with the `gguf` package, whatever the type."""
        gguf: Any = importlib.import_module("gguf")
        try:
            known = gguf.dequantize(read["codes"].numpy(), gguf.GGMLQuantizationType[self.kind])
        except NotImplementedError as error:
            raise InputError(f"gguf does not dequantize {self.kind}") from error
        return torch.from_numpy(known)

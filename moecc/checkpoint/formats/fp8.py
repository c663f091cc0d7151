"""FP8 as DeepSeek and Qwen have it: e4m3 weights [N, K], and a scale for each block of 128 x 128.

Scales are `weight_scale_inv` [N / 128, K / 128] in float32, bfloat16 or powers of two (e8m0), and
weight = code * scale, their name notwithstanding. transformers saves the experts of a layer as one
tensor [E, N, K] with scales of the same form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moecc.checkpoint.files import Tensor
from moecc.checkpoint.formats.bits import filled
from moecc.runtime.errors import InputError
from moecc.runtime.schemes import fp8
from moecc.runtime.schemes.scheme import FP8_BLOCKS, Quantized, Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """FP8 with blocks of one size."""

    rows: int
    columns: int
    method: ClassVar[str] = "fp8"
    weight_suffix: ClassVar[str] = ""
    suffixes: ClassVar[Mapping[str, str]] = {"codes": "", "scales": "_scale_inv"}
    optional: ClassVar[frozenset[str]] = frozenset()
    transposed: ClassVar[bool] = False

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "Fp8":
        """Read a checkpoint's `quantization_config`."""
        size = settings.get("weight_block_size") or (0, 0)
        return Fp8(rows=int(size[0]), columns=int(size[1]))

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Give that of the codes."""
        codes, scales = stored["codes"], stored["scales"]
        if codes.dtype != torch.float8_e4m3fn or len(codes.shape) < 2:
            raise InputError(f"it is {codes.dtype} {[*codes.shape]}, not a float8_e4m3fn matrix")
        if not self.rows or not self.columns:
            raise InputError("the checkpoint names no weight_block_size, and only blocks are read")
        *more, rows, columns = codes.shape
        wanted = (*more, -(-rows // self.rows), -(-columns // self.columns))
        if scales.shape != wanted or not scales.dtype.is_floating_point:
            raise InputError(
                f"its scales are {scales.dtype} {[*scales.shape]}, and blocks of {self.rows} x "
                f"{self.columns} need floats {[*wanted]}"
            )
        return codes.shape

    def scheme(self) -> Scheme:
        """Give fp8-b128."""
        if (self.rows, self.columns) != (FP8_BLOCKS.rows, FP8_BLOCKS.group):
            raise InputError(
                f"kernels read fp8 in blocks of 128 x 128, not {self.rows} x {self.columns}"
            )
        return FP8_BLOCKS

    def quantized(self, read: Mapping[str, torch.Tensor]) -> Quantized:
        """Take it as it is."""
        if not read["codes"].float().isfinite().all():
            raise InputError("its weights hold NaN")
        codes = filled(read["codes"].view(torch.uint8), self.columns)
        return Quantized(codes=codes, scales=read["scales"].float())

    def weight(self, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Dequantize, whatever the size of blocks."""
        blocks = Scheme(name="fp8", bits=8, scale=torch.float32, group=self.columns, rows=self.rows)
        return fp8.dequantize(self.quantized(read), blocks)[:, : read["codes"].shape[1]]

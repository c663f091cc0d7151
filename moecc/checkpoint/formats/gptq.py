"""GPTQ as AutoGPTQ and GPTQModel save it: weights of a few bits, packed along their input.

    qweight  int32 [K / 8, N]       eight rows of W.T in a word, the first in the lowest bits
    qzeros   int32 [K / group, N / 8]   each less 1, modulo 16; `checkpoint_format` gptq_v2: as is
    scales   float16 [K / group, N]
    g_idx    int32 [K]              the group of each column

    W[n, k] = (q[k, n] - zero[g_idx[k], n]) * scale[g_idx[k], n]

Columns that were quantized in another order (`desc_act`) have groups all over a row. Weights that
are dequantized may have them; kernels read neighbours, so experts may not.
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

_UNPACKED = (2, 4, 8)
"""Bits whose codes lie in one word each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """GPTQ with groups of one size."""

    bits: int
    group: int
    """-1: whole rows."""
    symmetric: bool
    less: int
    """What was taken from zeros before they were packed."""
    method: ClassVar[str] = "gptq"
    weight_suffix: ClassVar[str] = ".weight"
    suffixes: ClassVar[Mapping[str, str]] = {
        "codes": ".qweight", "zeros": ".qzeros", "scales": ".scales", "groups": ".g_idx",
    }  # fmt: skip
    optional: ClassVar[frozenset[str]] = frozenset({"groups"})
    transposed: ClassVar[bool] = False

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "Gptq":
        """Read a checkpoint's `quantization_config`."""
        return Gptq(
            bits=int(settings.get("bits", 4)),
            group=int(settings.get("group_size", 128)),
            symmetric=bool(settings.get("sym", True)),
            less=0 if settings.get("checkpoint_format") == "gptq_v2" else 1,
        )

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Give [N, K]."""
        check_dtype(stored, torch.int32, "codes", "zeros")
        if self.bits not in _UNPACKED:
            raise InputError(f"codes of {self.bits} bits are not read, those of {_UNPACKED} are")
        words, rows = stored["codes"].shape
        columns = words * 32 // self.bits
        groups = 1 if self.group == -1 else -(-columns // self.group)
        scales, zeros = stored["scales"].shape, stored["zeros"].shape
        if scales != (groups, rows) or zeros != (groups, -(-rows * self.bits // 32)):
            raise InputError(
                f"scales {[*scales]} and zeros {[*zeros]} do not fit {rows} rows of {columns} in "
                f"groups of {self.group}"
            )
        return rows, columns

    def scheme(self) -> Scheme:
        """Give int4, with points if zeros differ."""
        if self.bits != 4:
            raise InputError(f"kernels read GPTQ of 4 bits, not {self.bits}")
        return point_scheme(self.group, symmetric=self.symmetric)

    def quantized(self, read: Mapping[str, torch.Tensor]) -> Quantized:
        """Turn it to rows."""
        scheme, codes = self.scheme(), unpack(read["codes"], self.bits, 0).T
        columns = codes.shape[1]
        if not torch.equal(self._groups(read, columns), self._plain_groups(columns)):
            raise InputError(
                "its g_idx is in act-order (desc_act), and kernels read groups of neighbours; "
                "quantize the model without desc_act, or give quantize= to round it anew"
            )
        zeros = self._zeros(read).T
        if self.symmetric and not (zeros == 1 << self.bits - 1).all():
            raise InputError("its zeros differ, and the checkpoint's configuration says sym")
        points = regrouped(zeros.to(torch.float16), self.group, scheme, columns)
        return Quantized(
            codes=filled(codes.to(torch.uint8), scheme.block),
            scales=regrouped(halves(read["scales"]).T, self.group, scheme, columns),
            zeros=points if scheme.points else None,
        )

    def weight(self, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Dequantize, in whatever order its columns were quantized."""
        codes = unpack(read["codes"], self.bits, 0)
        groups = self._groups(read, len(codes)).long()
        return ((codes - self._zeros(read)[groups]) * read["scales"].float()[groups]).T

    def _zeros(self, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Give [K / group, N]; what was 0 is now 2^bits - 1, and wraps round."""
        packed = unpack(read["zeros"], self.bits, 1)[:, : read["codes"].shape[1]]
        return packed + self.less & (1 << self.bits) - 1

    def _groups(self, read: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
        groups = read.get("groups", self._plain_groups(columns))
        if groups.shape != (columns,) or groups.min() < 0 or groups.max() >= len(read["scales"]):
            raise InputError(f"its g_idx {[*groups.shape]} is not a group for each of {columns}")
        return groups

    def _plain_groups(self, columns: int) -> torch.Tensor:
        columns_of = torch.arange(columns, dtype=torch.int32)
        return torch.zeros_like(columns_of) if self.group == -1 else columns_of // self.group

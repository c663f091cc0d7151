"""Pack quantized matrices for kernels: panels of 16 rows, four columns of all of them in a line.

    panel    scales, to a whole line | lines
    line     64 bytes: columns k..k+3 of row 0, of row 1, ... of row 15
             with 4-bit codes columns k..k+7: the first four in the low halves of the bytes
             with 2-bit codes columns k..k+15: the first four in the lowest quarters
             with 3-bit codes two lines of their low bits, and one with the third bits of both
    scales   of 16 rows for each group in turn; with zeros, then their 16 zeros
             one for each group where rows share them

One vector of a kernel then belongs to as many rows, and sums need no addition across lanes. Rows
are filled up to whole panels and columns to whole blocks; what is filled up is multiplied by zero.
"""

import functools
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F

from moecc.runtime.errors import InputError
from moecc.runtime.schemes import fp8, grouped, int8, mxfp4
from moecc.runtime.schemes.compensate import compensate
from moecc.runtime.schemes.scheme import Quantized, Scheme

_LEAST_IMPORTANCE = 0.01
"""Of a column, over the mean of all."""
ROWS = 16
LINE = 64


class Format(Protocol):
    """What the file of a format has: each rounds or gives back one matrix [N, K]."""

    def nearest(self, weight: torch.Tensor, scheme: Scheme) -> Quantized:
        """Round to nearest."""
        ...

    def quantize(
        self, weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None
    ) -> Quantized:
        """Round with fitted scales; `importance` [K] is what columns weigh in the fit."""
        ...

    def dequantize(self, quantized: Quantized, scheme: Scheme) -> torch.Tensor:
        """Give what codes stand for."""
        ...


FORMATS: Mapping[str, Format] = {
    "int8": int8,
    "fp8": fp8,
    "mxfp4": mxfp4,
    **dict.fromkeys(("int4", "int3", "int2"), grouped),
}


def quantize(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None
) -> Quantized:
    """Quantize a matrix [N, K]; columns are filled up to whole blocks.

    `importance` [K] is the mean square of each input, which errors of its column weigh; None: all
    weigh the same. A matrix [K, K] has their products with each other, too, by which codes of int4,
    int3 and int2 make up for each other's errors (`compensate`). Raises `InputError` when a weight
    is not finite, or too large for the scheme's scales.
    """
    hessian = None
    if importance is not None and importance.dim() == 2:
        hessian, importance = importance, importance.diagonal()
    if importance is not None:
        mean = importance.float().mean()
        # Inputs that calibration saw little of may be larger elsewhere.
        known = (importance.float() / mean).clamp(min=_LEAST_IMPORTANCE) if mean > 0 else None
        importance = None if known is None else _in_blocks(known.unsqueeze(0), scheme)[0]
    fitted = FORMATS[scheme.name].quantize(_in_blocks(weight, scheme), scheme, importance)
    if hessian is None or importance is None or FORMATS[scheme.name] is not grouped:
        return fitted
    return compensate(weight, hessian, fitted, scheme)


def nearest(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Quantize a matrix as `quantize` does, by plain rounding: what a fit has to be better than."""
    return FORMATS[scheme.name].nearest(_in_blocks(weight, scheme), scheme)


def dequantize(quantized: Quantized, scheme: Scheme) -> torch.Tensor:
    """Give the float32 matrix [N, K] that codes stand for."""
    return FORMATS[scheme.name].dequantize(quantized, scheme)


def _in_blocks(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Fill columns up with those of the last block, over and over, so that its fit stays theirs."""
    if not weight.isfinite().all():
        raise InputError(
            f"weights of shape {[*weight.shape]} hold inf or NaN; {scheme} has neither"
        )
    columns, block = weight.shape[1], scheme.block
    whole = columns // block * block
    if whole == columns:
        return weight
    column = torch.arange(_filled(columns, block), device=weight.device)
    column[columns:] = whole + (column[columns:] - whole) % (columns - whole)
    return weight[:, column]


@functools.cache
def panel_bytes(columns: int, scheme: Scheme) -> int:
    """Size of 16 rows of so many columns."""
    return scale_bytes(columns, scheme) + ROWS * _filled(columns, scheme.block) * scheme.bits // 8


def scale_bytes(columns: int, scheme: Scheme) -> int:
    """Size of the scales of 16 rows, filled up to a line: where the panel's codes begin."""
    groups = _filled(columns, scheme.block) // scheme.block if scheme.group else 1
    size = _sharing(scheme) * scheme.scale.itemsize * groups * (2 if scheme.zeros else 1)
    return _filled(size, LINE)


@functools.cache
def packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Size of a packed matrix."""
    return -(-rows // ROWS) * panel_bytes(columns, scheme)


def pack_experts(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantize and pack the matrices [E, N, K] of a product: uint8 [E, bytes].

    `importance` [K] is that of `quantize`, for all of them.
    """
    experts, rows, columns = weight.shape
    size = packed_bytes(rows, columns, scheme)
    packed = weight.new_empty(experts, size, dtype=torch.uint8)
    for expert in range(experts):
        packed[expert] = pack(quantize(weight[expert], scheme, importance), scheme)
    return packed


def unpack_experts(packed: torch.Tensor, shape: tuple[int, ...], scheme: Scheme) -> torch.Tensor:
    """Give the float32 matrices of `shape` [E, N, K] that packed ones stand for."""
    _, rows, columns = shape
    unpacked = (unpack(one, rows, columns, scheme) for one in packed)
    return torch.stack([dequantize(one, scheme)[:, :columns] for one in unpacked])


def pack(quantized: Quantized, scheme: Scheme) -> torch.Tensor:
    """Lay one matrix out: uint8 [bytes]."""
    codes = _in_panels(quantized.codes.view(torch.uint8))  # [panels, 16, K]
    lines = _lines(codes, scheme.bits)
    if scheme.rows > 1:
        scales = quantized.scales.repeat_interleave(scheme.rows // ROWS, 0)[: len(codes)]
        scales = scales.contiguous().view(torch.uint8)
    else:
        scales = _scales_in_panels(quantized.scales, quantized.zeros)
    fill = scale_bytes(quantized.codes.shape[1], scheme) - scales.shape[1]
    return torch.cat([F.pad(scales, (0, fill)), lines.flatten(1)], dim=1).flatten()


def unpack(packed: torch.Tensor, rows: int, columns: int, scheme: Scheme) -> Quantized:
    """Undo `pack` for a matrix of so many rows and columns; filled-up columns stay."""
    panels = packed.view(-1, panel_bytes(columns, scheme))
    start, filled = scale_bytes(columns, scheme), _filled(columns, scheme.block)
    codes = _codes(panels[:, start:], scheme.bits).reshape(-1, filled)[:rows]
    groups = filled // scheme.block if scheme.group else 1
    kinds = 2 if scheme.zeros else 1
    used = groups * kinds * _sharing(scheme) * scheme.scale.itemsize
    stored = panels[:, :used].contiguous().view(scheme.scale)
    if scheme.rows > 1:
        return Quantized(codes=codes, scales=stored[:: scheme.rows // ROWS])
    stored = stored.view(-1, groups, kinds, ROWS)
    scales = [kind.transpose(1, 2).reshape(-1, groups)[:rows] for kind in stored.unbind(2)]
    return Quantized(
        codes=codes.view(torch.int8) if scheme.name == "int8" else codes,
        scales=scales[0],
        zeros=scales[1] if scheme.zeros else None,
    )


def _filled(columns: int, block: int) -> int:
    return -(-columns // block) * block


def _sharing(scheme: Scheme) -> int:
    """Count the scales that a panel has for a group."""
    return ROWS if scheme.rows == 1 else 1


def _lines(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Lay codes [panels, 16, K] out: [panels, lines, 16, 4]."""
    if bits == 3:
        low, high = _lines(codes & 3, 2), _lines(codes >> 2, 1)
        pairs = low.reshape(len(low), -1, 2, ROWS, 4)
        return torch.cat([pairs, high.unsqueeze(2)], dim=2).flatten(1, 2)
    parts = codes.reshape(len(codes), ROWS, -1, 8 // bits, 4).unbind(3)
    line = parts[0]
    for place, part in enumerate(parts[1:], 1):
        line = line | part << bits * place
    return line.transpose(1, 2)


def _codes(lines: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `_lines` for bytes [panels, ..]: [panels, 16, K]."""
    if bits == 3:
        threes = lines.reshape(len(lines), -1, 3, LINE)
        return _codes(threes[:, :, :2], 2) | _codes(threes[:, :, 2], 1) << 2
    line = lines.reshape(len(lines), -1, ROWS, 4).transpose(1, 2)
    parts = [line >> bits * place & (1 << bits) - 1 for place in range(8 // bits)]
    return torch.stack(parts, dim=3).flatten(2)


def _in_panels(matrix: torch.Tensor) -> torch.Tensor:
    """See [N, C] as [panels, 16, C], filled up with zeros."""
    filled = F.pad(matrix, (0, 0, 0, -len(matrix) % ROWS))
    return filled.reshape(-1, ROWS, matrix.shape[1])


def _scales_in_panels(scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    kinds = [scales] if zeros is None else [scales, zeros]
    panels = torch.stack([_in_panels(kind).transpose(1, 2) for kind in kinds], dim=2)
    return panels.contiguous().view(torch.uint8).flatten(1)

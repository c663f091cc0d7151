"""fp8: w = code * scale, e4m3 codes, a float32 scale for each row or block of 128 x 128.

Blocks are how DeepSeek's and Qwen's FP8 checkpoints store weights. A code has 3 bits behind its
leading one, wherever the weight lies below the largest of its row: nothing to gain from a fit.
"""

import torch

from moecc.runtime.schemes.scheme import Quantized, Scheme

_LARGEST = 448.0
_SMALLEST = torch.finfo(torch.float32).tiny


def nearest(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Round a matrix [N, K] to nearest."""
    wide = weight.float()
    scales = _over_blocks(wide, scheme) / _LARGEST
    codes = wide / _spread(scales, wide.shape, scheme).clamp(min=_SMALLEST)
    return Quantized(codes=codes.to(torch.float8_e4m3fn).view(torch.uint8), scales=scales)


def quantize(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None
) -> Quantized:
    """Round to nearest.

    There is nothing to fit, whatever columns weigh.
    """
    return nearest(weight, scheme)


def dequantize(quantized: Quantized, scheme: Scheme) -> torch.Tensor:
    """Give the float32 matrix [N, K] that codes stand for."""
    codes = quantized.codes.view(torch.float8_e4m3fn).float()
    return codes * _spread(quantized.scales, codes.shape, scheme)


def _over_blocks(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Give the largest magnitude of each row, or block; the last rows may be fewer."""
    if scheme.group is None:
        return weight.abs().amax(1, keepdim=True)
    columns = weight.abs().reshape(len(weight), -1, scheme.group).amax(2)
    starts = range(0, len(columns), scheme.rows)
    return torch.stack([columns[start : start + scheme.rows].amax(0) for start in starts])


def _spread(scales: torch.Tensor, shape: torch.Size, scheme: Scheme) -> torch.Tensor:
    """Give each weight of [N, K] its scale, or each row."""
    if scheme.group is None:
        return scales
    rows = scales.repeat_interleave(scheme.rows, 0)[: shape[0]]
    return rows.repeat_interleave(scheme.group, 1)

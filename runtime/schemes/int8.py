"""int8: w = code * scale, codes -127..127, a float32 scale a row, or a float16 one a group."""

import torch

from moecc.runtime.errors import InputError
from moecc.runtime.schemes.scheme import Quantized, Scheme


def nearest(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Round a matrix [N, K] to nearest."""
    groups = _groups(weight.float(), scheme)
    scales = (groups.abs().amax(2, keepdim=True) / 127).to(scheme.scale)
    if not scales.isfinite().all():
        raise InputError(
            f"weights up to {float(weight.abs().max()):.3g} are too large for the float16 scales "
            f"of {scheme}; int8 has no such limit"
        )
    step = scales.float()
    codes = (groups / step.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
    return Quantized(codes=codes.to(torch.int8).flatten(1), scales=scales.squeeze(2))


def quantize(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None
) -> Quantized:
    """Round to nearest.

    At 8 bits there is nothing to gain from scales that clip, whatever columns weigh.
    """
    return nearest(weight, scheme)


def dequantize(quantized: Quantized, scheme: Scheme) -> torch.Tensor:
    """Give the float32 matrix [N, K] that codes stand for."""
    groups = _groups(quantized.codes.float(), scheme)
    return (groups * quantized.scales.float().unsqueeze(2)).flatten(1)


def _groups(matrix: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """See a matrix [N, K] as [N, groups, ..]; a whole row is one group."""
    return matrix.reshape(len(matrix), -1, scheme.group or matrix.shape[1])

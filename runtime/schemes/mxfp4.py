"""mxfp4: e2m1 codes in groups of 32 with a power of two each (OCP Microscaling Formats 1.0).

`nearest` takes the power that the largest weight of a group lies in, as the standard says: it then
rounds to 4, 6 or beyond, and what is beyond 6 is cut. `quantize` tries the powers beside it too and
keeps the one with the least squared error.
"""

import torch

from moecc.runtime.schemes.fit import (
    by_column,
    put_together,
    total,
    weigh,
    weighed_by_column,
)
from moecc.runtime.schemes.scheme import Quantized, Scheme

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What each code stands for."""


def nearest(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Round a matrix [N, K], K in whole groups: to nearest, ties to even codes, beyond 6 to 6."""
    parts = by_column(weight, scheme.block)
    return put_together([_coded(part, _power(part)) for part in parts], len(weight))


def quantize(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None
) -> Quantized:
    """Round a matrix [N, K], K in whole groups, with the best of three powers for each.

    `importance` [K] is what squared errors of each column weigh.
    """
    parts = weighed_by_column(weight, scheme.block, importance)
    return put_together([_coded(part, _fit(part, weights)) for part, weights in parts], len(weight))


def dequantize(quantized: Quantized, scheme: Scheme) -> torch.Tensor:
    """Give the float32 matrix [N, K] that codes stand for."""
    codes = quantized.codes
    values = VALUES.to(codes.device)[codes.long()].reshape(len(codes), -1, scheme.block)
    return (values * torch.exp2(quantized.scales.float() - 127).unsqueeze(-1)).flatten(1)


def _power(part: torch.Tensor) -> torch.Tensor:
    """Give the exponent with which the largest weight of a group falls within [4, 8)."""
    _, exponent = torch.frexp(part.abs().amax(0))  # amax = m * 2^e, m in [0.5, 1)
    return (exponent - 1 - 2).clamp(-126, 127)  # the largest code is 1.5 * 2^2


def _fit(part: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    nearest = best = _power(part)
    least = torch.full_like(part[0], torch.inf)
    for power in (nearest, nearest - 1, nearest + 1):
        power = power.clamp(-126, 127)
        scaled = part.abs() / torch.exp2(power.float())
        error = total(weigh((_magnitude(scaled) - scaled).square_(), weights))
        error *= torch.exp2(2.0 * (power - nearest))
        best = torch.where(error < least, power, best)
        least = torch.where(error < least, error, least)
    return best


def _magnitude(scaled: torch.Tensor) -> torch.Tensor:
    """Round to 0, 0.5, .. 2, 3, 4, 6: whole steps of 0.5, 1 and 2, each rounding ties to even.

    A multiple of a step is even in codes too, since each range begins with an even code.
    """
    step = torch.where(scaled < 2, 0.5, torch.where(scaled < 4, 1.0, 2.0))
    return (scaled / step).round_().mul_(step).clamp_(max=6)


def _coded(part: torch.Tensor, power: torch.Tensor) -> Quantized:
    scaled = part / torch.exp2(power.float())
    size = _magnitude(scaled.abs())
    # 0..2 are twice codes, 2..4 two more than them, and then comes 6.
    codes = torch.where(size <= 2, size * 2, torch.where(size <= 4, size + 2, 7.0))
    codes = codes + 8 * (scaled < 0)
    return Quantized(codes=codes.to(torch.uint8), scales=(power + 127).to(torch.uint8))

"""mxfp4: e2m1 codes in groups of 32 with a power of two each (OCP Microscaling Formats 1.0)."""

import torch

from moecc.runtime.schemes.scheme import MXFP4, Quantized

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What each code stands for."""
_BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
"""Half-way between magnitudes."""
_TIES_UP = torch.tensor([False, True, False, True, False, True, False])
"""Where the even code lies above the bound."""


def quantize(weight: torch.Tensor) -> Quantized:
    """Round a matrix [N, K], K in whole groups: to nearest, ties to even codes, beyond 6 to 6."""
    groups = weight.float().reshape(len(weight), -1, MXFP4.block)
    _, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))  # amax = m * 2^e, m in [0.5, 1)
    power = (exponent - 1 - 2).clamp(-126, 127)  # the largest code is 1.5 * 2^2
    scaled = groups / torch.exp2(power.float())
    above = scaled.abs().unsqueeze(-1) - _BOUNDS
    codes = ((above > 0) | ((above == 0) & _TIES_UP)).sum(-1) + 8 * (scaled < 0)
    return Quantized(
        codes=codes.to(torch.uint8).flatten(1), scales=(power + 127).to(torch.uint8).squeeze(-1)
    )


def dequantize(quantized: Quantized) -> torch.Tensor:
    """Give the float32 matrix [N, K] that codes stand for."""
    values = VALUES[quantized.codes.long()].reshape(len(quantized.codes), -1, MXFP4.block)
    return (values * torch.exp2(quantized.scales.float() - 127).unsqueeze(-1)).flatten(1)

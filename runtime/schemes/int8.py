"""int8: w = code * scale, codes -127..127, one float32 scale a row."""

import torch

from moecc.runtime.schemes.scheme import Quantized, Scheme


def nearest(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Round a matrix [N, K] to nearest."""
    wide = weight.float()
    scales = wide.abs().amax(1, keepdim=True) / 127
    codes = (wide / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
    return Quantized(codes=codes.to(torch.int8), scales=scales)


quantize = nearest
"""At 8 bits there is nothing to gain from scales that clip."""


def dequantize(quantized: Quantized, scheme: Scheme) -> torch.Tensor:
    """Give the float32 matrix [N, K] that codes stand for."""
    return quantized.codes.float() * quantized.scales

"""int4: w = (code - 8) * scale, or w = code * scale + zero; codes 0..15, groups along a row.

Without zeros the weight of largest magnitude gets code 0, as in llama.cpp's Q4_0, so that all
sixteen codes are of use.
"""

import torch

from moecc.runtime.schemes.scheme import Quantized, Scheme

_SMALLEST = 2.0**-24
"""Of float16: a scale below has no code to share."""


def quantize(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Round a matrix [N, K], K in whole groups, to nearest."""
    groups = weight.float().reshape(len(weight), -1, scheme.block)
    if scheme.zeros:
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scales, zeros = ((high - low) / 15).to(scheme.scale), low.to(scheme.scale)
    else:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scales, zeros = (largest / -8).to(scheme.scale), None
    step = scales.float()
    step = torch.where(step.abs() < _SMALLEST, torch.inf, step)
    codes = (groups - zeros.float()) / step if zeros is not None else groups / step + 8
    codes = codes.round().clamp(0, 15).to(torch.uint8).flatten(1)
    return Quantized(
        codes=codes,
        scales=scales.squeeze(-1),
        zeros=None if zeros is None else zeros.squeeze(-1),
    )


def dequantize(quantized: Quantized, scheme: Scheme) -> torch.Tensor:
    """Give the float32 matrix [N, K] that codes stand for."""
    codes = quantized.codes.float().reshape(len(quantized.codes), -1, scheme.block)
    scales = quantized.scales.float().unsqueeze(-1)
    if quantized.zeros is None:
        return ((codes - 8) * scales).flatten(1)
    return (codes * scales + quantized.zeros.float().unsqueeze(-1)).flatten(1)

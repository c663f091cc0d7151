"""int2, int3, int4: codes 0..2^bits - 1 in groups along a row, a float16 scale each.

    w = (code - 2^(bits - 1)) * scale        or, with zeros,        w = code * scale + zero
                                             or, with points,       w = (code - point) * scale

Without zeros the largest weight may get code 0, which has no counterpart on the other side, so that
all codes are of use (as in llama.cpp's Q4_0).

`nearest` spans the largest weights of a group. `quantize` fits scales and zeros to the squared
error instead: it rounds, solves for the best scale (and zero) of these codes, and rounds again,
from several ranges, some of which clip. With zeros the first turns are half-quadratic (Badri and
Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023): the part of an error
beyond what a root-norm bears is taken out before solving, so that clipped weights do not pull.
Last, groups are stretched to the size of their weights, of which least squares leaves a part out.
"""

from dataclasses import replace

import torch

from moecc.runtime.errors import InputError
from moecc.runtime.schemes.fit import (
    by_column,
    put_together,
    total,
    weigh,
    weighed_by_column,
)
from moecc.runtime.schemes.scheme import Quantized, Scheme

_SMALLEST = 2.0**-24
"""Of float16: a scale below has no code to share."""
_SYMMETRIC_STARTS = (1.0, 0.94, 0.85)
"""Parts of the largest weight that the outermost code stands for at first, on either side."""
_AFFINE_STARTS = (1.0, 0.92)
"""Parts of the range between smallest and largest that codes span at first."""
_TURNS, _ROBUST_TURNS = 2, 3
_MOST_STRETCHED = 1.5
"""Of a group whose codes express little of it."""
_SHARPNESS = 5.0
"""beta of the root-norm, for errors in steps: it bears 0.34 steps in full."""

_Fit = tuple[torch.Tensor, torch.Tensor]
"""Scale and the weight of code 0, for each group."""
_Weights = torch.Tensor | None
"""What errors weigh, [block, groups]; None: all the same."""


def nearest(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Round a matrix [N, K], K in whole groups, between the largest weights of each group."""
    parts = by_column(weight, scheme.block)
    if scheme.zeros:
        coded = [_coded(part, _span(part, scheme, 1.0), scheme) for part in parts]
    else:
        coded = [
            _coded(part, _signed(_largest(part) / -_half(scheme), scheme), scheme) for part in parts
        ]
    return put_together(coded, len(weight))


def quantize(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None
) -> Quantized:
    """Round a matrix [N, K], K in whole groups, with scales and zeros fitted to it.

    `importance` [K] is what squared errors of each column weigh.
    """
    fit = _fit_affine if scheme.zeros else _fit_symmetric
    parts = weighed_by_column(weight, scheme.block, importance)
    coded = [
        _as_large(part, weights, _coded(part, fit(part, weights, scheme), scheme), scheme)
        for part, weights in parts
    ]
    return put_together(coded, len(weight))


def dequantize(quantized: Quantized, scheme: Scheme) -> torch.Tensor:
    """Give the float32 matrix [N, K] that codes stand for."""
    codes = quantized.codes.float().reshape(len(quantized.codes), -1, scheme.block)
    scales = quantized.scales.float().unsqueeze(-1)
    if quantized.zeros is None:
        return ((codes - _half(scheme)) * scales).flatten(1)
    zeros = quantized.zeros.float().unsqueeze(-1)
    return ((codes - zeros) * scales if scheme.points else codes * scales + zeros).flatten(1)


def _fit_symmetric(part: torch.Tensor, weights: _Weights, scheme: Scheme) -> _Fit:
    """Find scales of least squared error, from a few, improved by turns.

    For codes q the best scale is wq / qq, and it explains (wq)^2 / qq of the weights' squares.
    """
    weighed = weigh(part, weights)
    smallest = 1 if weights is None else _SMALLEST  # of qq; codes of weighed groups may be no sum
    half, largest = _half(scheme), _largest(part)
    best, most = torch.zeros_like(largest), torch.full_like(largest, -1)
    for outermost in (-half, half - 1):
        for kept in _SYMMETRIC_STARTS:
            scale = largest * (kept / outermost)
            along = scale
            for _ in range(_TURNS):
                codes = _rounded(part, scale, -half, half - 1)
                along = total(weighed * codes)
                scale = along / total(weigh(codes.square_(), weights)).clamp_(min=smallest)
            explained = along * scale
            better = explained > most
            best = torch.where(better, scale, best)
            most = torch.where(better, explained, most)
    return _signed(best, scheme)


def _as_large(part: torch.Tensor, weights: _Weights, coded: Quantized, scheme: Scheme) -> Quantized:
    """Stretch groups so that what codes stand for reaches as far along the weights as those do.

    The scale of least squares explains a part of the weights and is smaller by the rest; what all
    groups lack adds up in a sum over them, where errors to either side do not.
    """
    codes, scales, zeros = coded.codes.float(), coded.scales.float(), coded.zeros
    if zeros is None or scheme.points:
        of_part = of_codes = torch.zeros_like(scales)
        codes = codes - (_half(scheme) if zeros is None else zeros.float())
    else:
        count = len(part) if weights is None else total(weights).clamp(min=_SMALLEST)
        of_part, of_codes = (total(weigh(one, weights)) / count for one in (part, codes))
    part, codes = part - of_part, codes - of_codes
    along = total(weigh(part, weights) * codes) * scales
    lacking = total(weigh(part.square(), weights)) / along.clamp(min=_SMALLEST)
    scales = scales * torch.where(along > 0, lacking, 1).clamp(1, _MOST_STRETCHED)
    if zeros is not None and not scheme.points:
        zeros = (of_part - of_codes * scales).to(scheme.scale)
    return replace(coded, scales=scales.to(scheme.scale), zeros=zeros)


def _fit_affine(part: torch.Tensor, weights: _Weights, scheme: Scheme) -> _Fit:
    """Find scales and zeros of least squared error, from a few ranges, improved by turns."""
    top = 2**scheme.bits - 1
    best, least = _span(part, scheme, 1.0), torch.full_like(part[0], torch.inf)
    for kept in _AFFINE_STARTS:
        fit = _span(part, scheme, kept)
        for turn in range(_ROBUST_TURNS + _TURNS):
            codes = _rounded(part - fit[1], fit[0], 0, top)
            wanted = part - _unbearable(part, codes, fit) if turn < _ROBUST_TURNS else part
            fit = _on_point(_line(wanted, codes, weights, fit), scheme)
        codes = _rounded(part - fit[1], fit[0], 0, top)
        error = total(weigh(_error(part, codes, fit).square_(), weights))
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, fit[0], best[0]), torch.where(better, fit[1], best[1]))
    return best


def _unbearable(part: torch.Tensor, codes: torch.Tensor, fit: _Fit) -> torch.Tensor:
    """Give the part of each error that the root-norm leaves out: |d| - 1 / (beta sqrt|d|)."""
    scale = _step(fit[0])
    error = _error(part, codes, fit).div_(scale)
    size = error.abs()
    borne = (size.clamp(min=1e-6).rsqrt_()).mul_(1 / _SHARPNESS)
    return size.sub_(borne).clamp_(min=0).mul_(error.sign_()).mul_(scale)


def _error(part: torch.Tensor, codes: torch.Tensor, fit: _Fit) -> torch.Tensor:
    return (codes * fit[0]).add_(fit[1]).neg_().add_(part)


def _line(wanted: torch.Tensor, codes: torch.Tensor, weights: _Weights, fit: _Fit) -> _Fit:
    """Solve for the line codes * scale + zero of least squares; keep the scale of equal codes."""
    count = len(codes) if weights is None else total(weights)
    weighed = weigh(codes, weights)
    goal, sums = total(weigh(wanted, weights)), total(weighed)
    spread = count * total(weighed * codes) - sums * sums
    slope = count * total(weighed * wanted) - sums * goal
    least = 1 if weights is None else 1e-4 * count * count  # spread of equal codes is no exact 0
    scale = torch.where(spread >= least, slope / spread.clamp(min=_SMALLEST), fit[0])
    return scale, (goal - scale * sums) / count


def _span(part: torch.Tensor, scheme: Scheme, kept: float) -> _Fit:
    """Spread codes over part of the range of each group, about its middle."""
    low, high = part.amin(0), part.amax(0)
    if scheme.points:  # codes of a group that is far from 0 would have their point out of reach
        low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**scheme.bits - 1
    scale = (high - low) * (kept / top)
    zero = low if kept == 1 else (low + high - scale * top) / 2
    return _on_point((scale, zero), scheme)


def _on_point(fit: _Fit, scheme: Scheme) -> _Fit:
    """Move code 0 so that a whole code, if only one beyond the others, stands for 0."""
    scale, zero = fit
    return (scale, (zero / _step(scale)).round_() * scale) if scheme.points else fit


def _signed(scale: torch.Tensor, scheme: Scheme) -> _Fit:
    return scale, -_half(scheme) * scale


def _largest(part: torch.Tensor) -> torch.Tensor:
    low, high = part.amin(0), part.amax(0)
    return torch.where(high > -low, high, low)


def _half(scheme: Scheme) -> int:
    return 2 ** (scheme.bits - 1)


def _step(scale: torch.Tensor) -> torch.Tensor:
    """Make scales to divide by: nothing is left of what is divided by one that is too small."""
    return torch.where(scale.abs() < _SMALLEST, torch.inf, scale)


def _rounded(part: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (part / _step(scale)).round_().clamp_(low, high)


def _coded(part: torch.Tensor, fit: _Fit, scheme: Scheme) -> Quantized:
    """Round [block, groups] with scales and zeros as they are stored."""
    scales = fit[0].to(scheme.scale)
    zeros = (-fit[1] / _step(fit[0])).round_() if scheme.points else fit[1]
    zeros = zeros.to(scheme.scale)
    if not (scales.isfinite() & zeros.isfinite()).all():
        raise InputError(
            f"weights up to {float(part.abs().max()):.3g} are too large for the float16 scales of "
            f"{scheme}; int8 and mxfp4 have no such limit"
        )
    if scheme.zeros:
        zero = -zeros.float() * scales.float() if scheme.points else zeros.float()
        codes = _rounded(part - zero, scales.float(), 0, 2**scheme.bits - 1)
    else:
        half = _half(scheme)
        codes = _rounded(part, scales.float(), -half, half - 1) + half
    return Quantized(
        codes=codes.to(torch.uint8), scales=scales, zeros=zeros if scheme.zeros else None
    )

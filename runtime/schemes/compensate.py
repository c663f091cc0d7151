"""Round column by column, and let the columns behind make up for each error.

An error of one column changes products by what its inputs have in common with others, and weights
that are not rounded yet can take that back: Frantar et al., "GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers", 2022. Scales and zeros stay as they were
fitted; what changes is which codes are chosen.
"""

from dataclasses import replace
from typing import cast

import torch

from moecc.runtime.schemes.scheme import Quantized, Scheme

_DAMPING = 0.1
"""Of the mean of the diagonal: another text has other inputs."""
_PART = 128
"""Columns that are compensated one by one; all behind them take a part's errors in one product."""


def compensate(
    weight: torch.Tensor, hessian: torch.Tensor, fitted: Quantized, scheme: Scheme
) -> Quantized:
    """Choose codes of a matrix [N, K] anew, with int4, int3 or int2 scales fitted to it.

    `hessian` [K, K] adds up the products of inputs with each other. Bytes depend on the number of
    threads, by the order of sums.
    """
    columns = weight.shape[1]
    damped = hessian.double()
    damped = damped + torch.eye(columns, device=damped.device) * damped.diagonal().mean() * _DAMPING
    inverse = cast(torch.Tensor, torch.linalg.inv(damped))
    upper = cast(torch.Tensor, torch.linalg.cholesky(inverse, upper=True)).float()
    left, codes = weight.float().clone(), fitted.codes.clone()
    scales, starts = _lines(fitted, scheme)
    for begin in range(0, columns, _PART):
        end = min(begin + _PART, columns)
        errors = left.new_empty(len(left), end - begin)
        for column in range(begin, end):
            scale, start = (one[:, column // scheme.block] for one in (scales, starts))
            code = ((left[:, column] - start) / scale).round_().clamp_(0, 2**scheme.bits - 1)
            codes[:, column] = code.to(codes.dtype)
            error = (left[:, column] - code * scale - start) / upper[column, column]
            left[:, column:end] -= error.unsqueeze(1) * upper[column, column:end]
            errors[:, column - begin] = error
        left[:, end:] -= errors @ upper[begin:end, end:]
    return replace(fitted, codes=codes)


def _lines(fitted: Quantized, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the step and the weight of code 0 of each group; groups of zeros have steps, too."""
    scales, zeros = fitted.scales.float(), fitted.zeros
    steps = torch.where(scales == 0, 1, scales)
    if zeros is None:
        return steps, scales * -(2 ** (scheme.bits - 1))
    return steps, -zeros.float() * scales if scheme.points else zeros.float()

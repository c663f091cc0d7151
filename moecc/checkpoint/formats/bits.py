"""Take integers of a few bits out of words, and fit groups of a checkpoint to those of kernels."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from moecc.checkpoint.files import Tensor
from moecc.runtime.errors import InputError
from moecc.runtime.schemes.scheme import Scheme, int4

_SIZES = (128, 64, 32)
"""Groups that kernels read, the cheapest first."""


def unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Take int32 words apart along a dimension, the lowest bits first: int32 0..2^bits - 1."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = len(shifts)
    apart = words.unsqueeze(dim + 1) >> shifts.view(shape) & (1 << bits) - 1
    return apart.flatten(dim, dim + 1)


def filled(codes: torch.Tensor, block: int) -> torch.Tensor:
    """Fill rows up to whole blocks; what is filled up is multiplied by zero."""
    return F.pad(codes, (0, -codes.shape[-1] % block))


def point_scheme(group: int, *, symmetric: bool) -> Scheme:
    """Give the int4 scheme that holds groups of a size, whole rows (-1) included.

    Raises `InputError` for groups that are no whole number of a kernel's.
    """
    size = next((one for one in _SIZES if group == -1 or (group > 0 and group % one == 0)), None)
    if size is None:
        raise InputError(f"groups of {group} are no whole number of groups of 32, 64 or 128")
    return int4(size, points=not symmetric)


def regrouped(per_group: torch.Tensor, group: int, scheme: Scheme, columns: int) -> torch.Tensor:
    """Repeat what groups of a checkpoint [N, groups] have for each of a scheme's own."""
    size = scheme.block
    count = -(-columns // size)
    repeats = count if group == -1 else group // size
    return per_group.repeat_interleave(repeats, 1)[:, :count].contiguous()


def halves(scales: torch.Tensor) -> torch.Tensor:
    """Give scales in float16; raises `InputError` if that would change one."""
    half = scales.to(torch.float16)
    if not torch.equal(half.to(scales.dtype), scales):
        raise InputError(f"its {scales.dtype} scales have values that float16 has not")
    return half


def check_dtype(stored: Mapping[str, Tensor], dtype: torch.dtype, *roles: str) -> None:
    """Raise `InputError` if tensors of some roles, all by default, have another dtype."""
    for role in roles or stored:
        if role in stored and stored[role].dtype != dtype:
            raise InputError(f"its {role} are {stored[role].dtype}, not {dtype}")

"""Choose the algorithm and the block sizes of the Triton kernels: rules on numbers, no tables.

Nothing here needs triton or tensors.
"""

import math
from dataclasses import dataclass

import torch

from moecc.codegen.spec import KernelSpec
from moecc.runtime.schemes.packing import ROWS
from moecc.runtime.schemes.scheme import Scheme

MAX_DECODE_TOKENS = 16
"""Kernels like the decode ones cross over with grouped ones near here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The block that one program computes."""

    m: int
    """Rows: assignments to one expert. 1 in decode kernels."""
    n: int
    """Columns of the result."""
    k: int
    """Depth of one step."""
    num_warps: int
    num_stages: int = 3

    def __str__(self) -> str:
        """Print as in reports, `64x128x64`."""
        return f"{self.m}x{self.n}x{self.k}"


def power_of_two(value: int) -> int:
    """Round up to a power of two, which every block size must be."""
    return 1 << max(value - 1, 0).bit_length()


def prefers_decode(spec: KernelSpec, tokens: int, active: int) -> bool:
    """Tell whether the decode kernels should run.

    They read an expert once for each of its rows. The grouped kernels read it once, but sort first
    and pad each expert to 16 rows. With few tokens most experts have one row and there is nothing
    to share; reading half as much again, partly from L2, is what two more launches cost.
    """
    if tokens <= 1:
        return True
    touched = spec.experts * (1 - (1 - min(active / spec.experts, 1.0)) ** tokens)
    return tokens <= MAX_DECODE_TOKENS and tokens * active <= 1.5 * touched


def block_ms(spec: KernelSpec) -> tuple[int, ...]:
    """List the tile heights that `choose_block_m` picks from; each is a compilation.

    Without tensor cores (float32) a taller tile saves little and costs registers.
    """
    return (16, 32, 64) if spec.dtype == torch.float32 else (16, 32, 64, 128)


def choose_block_m(spec: KernelSpec, tokens: int, active: int) -> int:
    """Choose the tile height from the mean number of rows of an expert.

    Twice the mean up to 64, so that most experts fit one tile and their weights are read once. With
    more rows every expert has several tiles anyway, and the tallest saves the most reads.
    """
    heights = block_ms(spec)
    mean = tokens * active / min(spec.experts, tokens * active)
    if mean > 64:
        return heights[-1]
    return min(max(power_of_two(math.ceil(2 * mean)), heights[0]), 64)


def grouped_tile(spec: KernelSpec, block_m: int, columns: int, depth: int, products: int) -> Tile:
    """Choose the tile of a grouped kernel with `products` results (gate and up) per column.

    A step moves (m + n) * k weights and states for m * n * k products, so both sides should be
    large. What bounds them is the accumulator: 64 registers of each thread, which every target from
    sm_80 on compiles without spills; float32 has no tensor cores and needs the registers itself.
    """
    if spec.dtype == torch.float32:
        n, k, num_warps, num_stages = 64 // products, 32, 8 if block_m == 64 else 4, 2
    elif block_m == 128:
        n, k, num_warps, num_stages = 128 // products, 64, 8, 3
    elif block_m == 64:
        n, k, num_warps, num_stages = 128 // products, 64, 4, 3
    else:
        n, k, num_warps, num_stages = 128 // products, 64, 4, 4
    if columns % 8 or depth % 8:
        n, k = n // 2, 32  # not aligned to 16 bytes: every element is a load and needs an address
    return Tile(
        m=block_m,
        n=min(n, max(16, power_of_two(columns))),
        k=min(k, max(16, power_of_two(depth))),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def decode_tile(columns: int, depth: int, transposed: bool, scheme: Scheme | None = None) -> Tile:
    """Choose the tile of a decode kernel, whose weights are input-major if `transposed`.

    4096 weights a step: 16 for each thread, 32 with gates and ups, all read before the first is
    used. That many reads in flight hide the latency, and matrices of usual size still make a few
    programs for every SM. The longer side lies along memory. Packed weights come in panels of 16
    rows; a step is 16 bytes a thread, as many codes as that is.
    """
    n, k = (32, 128) if transposed else (4, 1024)
    if scheme is not None:
        n, k = ROWS, 2048 // scheme.bits
        return Tile(m=1, n=n, k=min(k, max(64, power_of_two(depth))), num_warps=8)
    return Tile(
        m=1,
        n=min(n, power_of_two(columns)),
        k=min(k, power_of_two(depth)),
        num_warps=8,
    )

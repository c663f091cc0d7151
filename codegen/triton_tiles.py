"""Choose the block sizes of the Triton kernels: rules on numbers, no tables.

Nothing here needs triton or tensors.
"""

from dataclasses import dataclass

import torch

from moecc.codegen.gpus import Gpu
from moecc.codegen.spec import KernelSpec
from moecc.runtime.schemes.packing import ROWS
from moecc.runtime.schemes.scheme import Scheme

PERSISTENT_M = 128
"""Rows of a tile of the persistent kernels."""


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
    swapped: bool = False
    """The weights are the rows of the product (`kernels/tiles.multiply`)."""
    max_registers: int | None = None
    """Of a thread. Where tensor memory holds the accumulator, ptxas spills some to fit more blocks
    unless it is told."""

    def __str__(self) -> str:
        """Print as in reports, `64x128x64`."""
        return f"{self.m}x{self.n}x{self.k}"


def power_of_two(value: int) -> int:
    """Round up to a power of two, which every block size must be."""
    return 1 << max(value - 1, 0).bit_length()


def block_ms(spec: KernelSpec) -> tuple[int, ...]:
    """List the tile heights that `choose_plan` picks from; each is a compilation.

    Without tensor cores (float32) a taller tile saves little and costs registers.
    """
    return (16, 32, 64) if spec.dtype == torch.float32 else (16, 32, 64, 128)


def grouped_tile(
    spec: KernelSpec, gpu: Gpu, block_m: int, columns: int, depth: int, products: int
) -> Tile:
    """Choose the tile of a grouped kernel with `products` results (gate and up) per column.

    A step moves (m + n) * k weights and states for m * n * k products, so both sides should be
    large. What bounds them is the accumulator: 64 registers of each thread, which every target from
    sm_80 on compiles without spills; float32 has no tensor cores and needs the registers itself.
    Two stages lie in shared memory while the third is computed: with more, 100 KiB hold one block.
    Tensor cores that need 64 rows get them from the weights where there are not as many tokens.
    """
    if spec.dtype == torch.float32:
        n, k, num_warps, num_stages = 64 // products, 32, 8 if block_m == 64 else 4, 2
    elif block_m == 128:
        n, k, num_warps, num_stages = 128 // products, 64, 8, 3
    elif block_m == 64:
        # Two products, and the codes of two tiles, need the registers of 8 warps.
        num_warps = 8 if spec.schemes and products == 2 else 4
        n, k, num_stages = 128 // products, 64, 3
    else:
        int4 = spec.schemes is not None and spec.schemes.first.name == "int4"
        num_warps = 8 if int4 and products == 2 and block_m == 16 else 4  # likewise, on sm_120
        n, k, num_stages = 128 // products, 64, 3
    if columns % 8 or depth % 8:
        n, k = n // 2, 32  # not aligned to 16 bytes: every element is a load and needs an address
    n = min(n, max(16, power_of_two(columns)))
    fp8 = spec.schemes is not None and spec.schemes.first.name == "fp8"
    swapped = gpu.wide_products and spec.dtype != torch.float32 and block_m < 64 <= n
    return Tile(
        m=block_m,
        n=n,
        k=min(k, max(16, power_of_two(depth))),
        num_warps=num_warps,
        num_stages=num_stages,
        swapped=swapped,
        max_registers=128 if swapped and gpu.tensor_memory and fp8 else None,
    )


def can_persist(spec: KernelSpec, gpu: Gpu) -> bool:
    """Tell whether there are persistent kernels: plain half-precision weights, by descriptor.

    Descriptors need rows of a multiple of 16 bytes; gates and ups in two tensors are not one block.
    """
    plain = spec.schemes is None and spec.dtype != torch.float32 and not spec.split
    return gpu.descriptors and plain and spec.hidden % 8 == 0 and spec.intermediate % 8 == 0


def persistent_tile(gpu: Gpu, columns: int, depth: int, products: int) -> Tile:
    """Choose the tile of a persistent kernel, of which an SM runs one block.

    wgmma and tcgen05 read operands from shared memory, which 4 stages fill, and so leave 128
    registers of each thread for the accumulator; others have to hold the operands in registers.
    """
    n = (256 if gpu.wide_products else 128) // products
    return Tile(
        m=PERSISTENT_M,
        n=min(n, max(16, power_of_two(columns))),
        k=min(64, max(16, power_of_two(depth))),
        num_warps=8,
        num_stages=4 if gpu.wide_products else 3,
    )


def decode_tile(columns: int, depth: int, transposed: bool, scheme: Scheme | None = None) -> Tile:
    """Choose the tile of a decode kernel, whose weights are input-major if `transposed`.

    4096 weights a step: 16 for each thread, 32 with gates and ups, all read before the first is
    used. That many reads in flight hide the latency, and matrices of usual size still make a few
    programs for every SM. The longer side lies along memory. Packed weights come in panels of 16
    rows; a step is 16 bytes a thread, as many codes as that is, and no more than one scale if rows
    share theirs.
    """
    n, k = (32, 128) if transposed else (4, 1024)
    if scheme is not None:
        k = 2048 // scheme.bits
        if scheme.name == "fp8":
            k //= 2  # ptxas puts two registers of 16 bytes of codes on the stack for sm_80
        if scheme.rows > 1 and scheme.group:
            k = min(k, scheme.group)
        return Tile(m=1, n=ROWS, k=min(k, max(64, power_of_two(depth))), num_warps=8)
    return Tile(
        m=1,
        n=min(n, power_of_two(columns)),
        k=min(k, power_of_two(depth)),
        num_warps=8,
    )

"""Find and multiply tiles: what the kernels on rows sorted by expert share.

A row of the tile map (`routing`) is the expert of a tile, the position of its first row and the end
of the expert's rows.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(tiles_ptr, tile):
    """Load a row of the map: expert (-1: no tile), first position, end."""
    row = tiles_ptr + 3 * tile
    return tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def count_tiles(tiles_ptr, num_tiles):
    """Count the rows of the map that are tiles; they come before those that are not."""
    STEP: tl.constexpr = 256
    count = 0
    for first in range(0, num_tiles, STEP):
        tile = first + tl.arange(0, STEP)
        expert = tl.load(tiles_ptr + 3 * tile, mask=tile < num_tiles, other=-1)
        count += tl.sum((expert >= 0).to(tl.int32), axis=0)
    return count


@triton.jit
def multiply(x, w, product, SWAPPED: tl.constexpr):
    """Add x [M, K] times w [K, N] to product [M, N], or to its transpose [N, M] if SWAPPED.

    Tensor cores that take at least 64 rows (wgmma, tcgen05) take as few as 8 columns: for few
    tokens, weights are the rows.
    """
    if SWAPPED:
        product = tl.dot(tl.trans(w), tl.trans(x), product, input_precision="ieee")
    else:
        product = tl.dot(x, w, product, input_precision="ieee")
    return product


@triton.jit
def halve(x):
    """Split [M, 2N] into its left and its right half."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N)), (0, 2, 1)))


@triton.jit
def load_block(
    weight_desc, slot, n, start, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Load ROWS rows from n of a matrix, BLOCK_K columns from start: [BLOCK_K, ROWS].

    The descriptor is one of [E, parts, rows, columns], or of [E, columns, parts, rows] if
    TRANSPOSED, and has the rows of all parts in a block. What lies outside is 0.
    """
    if TRANSPOSED:
        w = tl.reshape(weight_desc.load([slot, start, 0, n]), (BLOCK_K, ROWS))
    else:
        w = tl.trans(tl.reshape(weight_desc.load([slot, 0, n, start]), (ROWS, BLOCK_K)))
    return w

"""Multiply as `grouped_down` does, with one program on each SM for all tiles.

What a next tile needs is on its way while the last one is scaled and stored. Weights and rows of
`inner` come by tensor descriptor (TMA).
"""

import triton
import triton.language as tl

from moecc.codegen.kernels.choices import locate
from moecc.codegen.kernels.grouped_down import store_terms
from moecc.codegen.kernels.tiles import count_tiles, halve, load_block, load_tile


@triton.jit(do_not_specialize=["num_tiles"])
def persistent_down(
    inner_desc,  # [T*K, I] in the order of `order`
    weight_desc,  # [E, 1, H, I], see load_block
    bias_ptr,  # [E, H] or None
    slots_ptr,  # [E] or None
    weights_ptr,  # [T*K] routing weights
    order_ptr,  # [T*K], see routing
    tiles_ptr,  # [num_tiles, 3]
    terms_ptr,  # [T*K, H], written where the expert exists
    num_tiles,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    DOWN_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of terms
    BLOCK_K: tl.constexpr,
    DOWN_SPECIALIZED: tl.constexpr,  # warps that copy, multiply and store are others
):
    """Compute the tiles of terms whose number is this program's, and every further one."""
    NUM_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N

    count = count_tiles(tiles_ptr, num_tiles)
    for item in tl.range(
        tl.program_id(0),
        count * NUM_N,
        tl.num_programs(0),
        flatten=not DOWN_SPECIALIZED,  # which runs ahead by itself
        warp_specialize=DOWN_SPECIALIZED,
    ):
        tile, column = tl.swizzle2d(item // NUM_N, item % NUM_N, count, NUM_N, 8)
        expert, first, end = load_tile(tiles_ptr, tile)
        slot, _ = locate(slots_ptr, expert, True)

        out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, INTERMEDIATE, BLOCK_K):
            # Rows from `end` on are another expert's: they are multiplied and not stored.
            x = inner_desc.load([first, start])
            w = load_block(
                weight_desc, slot, column * BLOCK_N, start, DOWN_TRANSPOSED, BLOCK_N, BLOCK_K
            )
            out = tl.dot(x, w, out)

        # A quarter at a time: addresses and biases of all columns would not fit the registers.
        QUARTER: tl.constexpr = BLOCK_N // 4
        position = first + tl.arange(0, BLOCK_M)
        left, right = halve(out)
        quarters = halve(left) + halve(right)
        for part in tl.static_range(4):
            n = column * BLOCK_N + part * QUARTER + tl.arange(0, QUARTER)
            store_terms(
                quarters[part],
                expert,
                n,
                position,
                end,
                bias_ptr,
                weights_ptr,
                order_ptr,
                terms_ptr,
                HIDDEN,
            )

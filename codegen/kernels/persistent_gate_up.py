"""Multiply as `grouped_gate_up` does, with one program on each SM for all tiles.

What a next tile needs is on its way while the last one is activated and stored. Weights come by
tensor descriptor (TMA), gates and ups in one block for one product; hidden states too, where
descriptors gather rows.
"""

import triton
import triton.language as tl

from moecc.codegen.kernels.choices import locate
from moecc.codegen.kernels.grouped_gate_up import store_inner
from moecc.codegen.kernels.tiles import count_tiles, halve, load_block, load_tile


@triton.jit
def split_products(product, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Split [M, R] into gates and ups, each of the left and of the right half of the columns."""
    left, right = halve(product)
    if GATED and INTERLEAVED:
        SHAPE: tl.constexpr = (left.shape[0], left.shape[1] // 2, 2)
        gate, up = tl.split(tl.reshape(left, SHAPE))
        right_gate, right_up = tl.split(tl.reshape(right, SHAPE))
        gates, ups = (gate, right_gate), (up, right_up)
    elif GATED:
        gates, ups = halve(left), halve(right)
    else:
        gates, ups = (left, right), (left, right)
    return gates, ups


@triton.jit(do_not_specialize=["active", "num_tiles"])
def persistent_gate_up(
    hidden_ptr,  # [T, H]; a descriptor with blocks of a row if GATHERED
    weight_desc,  # [E, 2, I, H] if gated and not INTERLEAVED, else [E, 1, R, H]; see load_block
    bias_ptr,  # [E, 2I if GATED else I] or None
    learned_ptr,  # [E, I] or None
    slots_ptr,  # [E] or None
    order_ptr,  # [T*K], see routing
    tiles_ptr,  # [num_tiles, 3]
    inner_ptr,  # [T*K, I] in the order of `order`, written
    active,  # K
    num_tiles,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,  # (gate or x, up, learned) -> value
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of inner
    BLOCK_K: tl.constexpr,
    GATHERED: tl.constexpr,
    SPECIALIZED: tl.constexpr,  # warps that copy, multiply and store are others
):
    """Compute the tiles of inner whose number is this program's, and every further one."""
    NUM_N: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    ROWS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    STEP: tl.constexpr = 2 * BLOCK_N if GATED and INTERLEAVED else BLOCK_N

    count = count_tiles(tiles_ptr, num_tiles)
    k = tl.arange(0, BLOCK_K)
    for item in tl.range(
        tl.program_id(0),
        count * NUM_N,
        tl.num_programs(0),
        flatten=not SPECIALIZED,  # which runs ahead by itself
        warp_specialize=SPECIALIZED,
    ):
        tile, column = tl.swizzle2d(item // NUM_N, item % NUM_N, count, NUM_N, 8)
        expert, first, end = load_tile(tiles_ptr, tile)
        slot, _ = locate(slots_ptr, expert, True)
        position = first + tl.arange(0, BLOCK_M)
        in_rows = position < end
        token = tl.load(order_ptr + position, mask=in_rows, other=0) // active
        if not GATHERED:
            x_ptrs = hidden_ptr + token.to(tl.int64)[:, None] * HIDDEN + k[None, :]

        product = tl.zeros((BLOCK_M, ROWS), dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            if GATHERED:
                x = hidden_ptr.gather(token, start)
            else:
                x_mask = in_rows[:, None]
                if HIDDEN % BLOCK_K != 0:
                    x_mask &= (k < HIDDEN - start)[None, :]
                x = tl.load(x_ptrs + start, mask=x_mask, other=0.0)
            w = load_block(weight_desc, slot, column * STEP, start, TRANSPOSED, ROWS, BLOCK_K)
            product = tl.dot(x.to(inner_ptr.dtype.element_ty), w, product)

        # A half at a time: addresses and biases of all columns would not fit the registers.
        HALF: tl.constexpr = BLOCK_N // 2
        gates, ups = split_products(product, GATED, INTERLEAVED)
        for side in tl.static_range(2):
            n = column * BLOCK_N + side * HALF + tl.arange(0, HALF)
            store_inner(
                gates[side],
                ups[side],
                expert,
                n,
                position,
                end,
                bias_ptr,
                learned_ptr,
                inner_ptr,
                INTERMEDIATE,
                GATED,
                INTERLEAVED,
                ACTIVATION,
            )

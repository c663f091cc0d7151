"""Sort the assignments by expert and cut each expert's run into tiles of rows, on the device.

The result is two int32 tensors, the same from both forms (this one and `routing_chunked`):

    order [T*K]    assignments sorted by expert, in order of appearance within an expert
    tiles [N, 3]   per tile: expert, first position in `order`, end of the expert's positions;
                   expert is -1 for the tiles that the bound N has too many

N is a bound that the host knows without a synchronisation. This form is one program, for few
assignments: one launch instead of three, and the experts' counts never leave the registers.
"""

import triton
import triton.language as tl

from moecc.codegen.kernels.choices import locate


@triton.jit
def load_experts(ids_ptr, slots_ptr, index, assignments, EXPERTS: tl.constexpr):
    """Load the experts of some assignments, and which of them are there; others may become 0."""
    ids = tl.load(ids_ptr + index, mask=index < assignments, other=-1)
    valid = (ids >= 0) & (ids < EXPERTS)
    expert = tl.where(valid, ids, 0).to(tl.int32)
    _, valid = locate(slots_ptr, expert, valid)
    return expert, valid


@triton.jit
def rank_among_equals(
    ids_ptr, slots_ptr, start, expert, assignments, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Count for each of BLOCK assignments from `start` the earlier ones with the same expert."""
    STEP: tl.constexpr = 32  # comparing all with all at once would not fit the registers
    lane = tl.arange(0, BLOCK)
    hits = tl.zeros((BLOCK, STEP), dtype=tl.int32)
    for step in range(0, BLOCK, STEP):
        other = step + tl.arange(0, STEP)
        other_expert, other_valid = load_experts(
            ids_ptr, slots_ptr, start + other, assignments, EXPERTS
        )
        same = (expert[:, None] == other_expert[None, :]) & other_valid[None, :]
        hits += (same & (other[None, :] < lane[:, None])).to(tl.int32)
    return tl.sum(hits, axis=1)


@triton.jit
def store_tiles(tiles_ptr, num_tiles, counts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write the tile map from the number of rows of each expert."""
    expert = tl.arange(0, BLOCK_E)
    end = tl.cumsum(counts, axis=0)
    tiles = tl.cdiv(counts, BLOCK_M)
    tile = tl.cumsum(tiles, axis=0) - tiles
    for j in range(tl.max(tiles, axis=0)):
        row = tiles_ptr + 3 * (tile + j)
        tl.store(row, expert, mask=j < tiles)
        tl.store(row + 1, end - counts + j * BLOCK_M, mask=j < tiles)
        tl.store(row + 2, end, mask=j < tiles)
    for first in range(tl.sum(tiles, axis=0), num_tiles, BLOCK_E):
        unused = first + expert
        tl.store(tiles_ptr + 3 * unused, -1, mask=unused < num_tiles)


@triton.jit(do_not_specialize=["assignments", "num_tiles"])
def route(
    ids_ptr,  # [T*K] any integer type
    slots_ptr,  # [E] or None: where experts lie; negative are not there
    order_ptr,  # [T*K] int32, written
    tiles_ptr,  # [num_tiles, 3] int32, written
    assignments,  # T*K
    num_tiles,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two >= EXPERTS
    BLOCK_M: tl.constexpr,
):
    """Sort and cut in one program: count, scan, then place chunk after chunk."""
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, assignments, BLOCK):
        expert, valid = load_experts(ids_ptr, slots_ptr, start + lane, assignments, EXPERTS)
        counts += tl.histogram(expert, BLOCK_E, mask=valid)
    store_tiles(tiles_ptr, num_tiles, counts, BLOCK_E, BLOCK_M)

    cursor = tl.cumsum(counts, axis=0) - counts
    for start in range(0, assignments, BLOCK):
        expert, valid = load_experts(ids_ptr, slots_ptr, start + lane, assignments, EXPERTS)
        rank = rank_among_equals(ids_ptr, slots_ptr, start, expert, assignments, EXPERTS, BLOCK)
        tl.store(order_ptr + tl.gather(cursor, expert, axis=0) + rank, start + lane, mask=valid)
        cursor += tl.histogram(expert, BLOCK_E, mask=valid)

"""Sort the assignments by expert with a program per chunk: `routing` for many assignments.

Three launches of a counting sort, stable and without atomics:

    count_experts    chunk c     counts[e, c] = its assignments to expert e
    scan_chunks      expert e    counts[e, c] -> assignments to e before chunk c; totals[e]
    place_chunks     chunk c     order; one more program writes the tile map
"""

import triton
import triton.language as tl

from moecc.codegen.kernels.routing import load_experts, rank_among_equals, store_tiles


@triton.jit(do_not_specialize=["assignments"])
def count_experts(
    ids_ptr,  # [T*K] any integer type
    slots_ptr,  # [E] or None, as in route
    counts_ptr,  # [E, chunks] int32, written
    assignments,  # T*K
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Count the assignments of one chunk to each expert."""
    chunk = tl.program_id(0)
    index = chunk * BLOCK + tl.arange(0, BLOCK)
    expert, valid = load_experts(ids_ptr, slots_ptr, index, assignments, EXPERTS)
    counts = tl.histogram(expert, BLOCK_E, mask=valid)
    experts = tl.arange(0, BLOCK_E)
    at = counts_ptr + experts.to(tl.int64) * tl.num_programs(0) + chunk
    tl.store(at, counts, mask=experts < EXPERTS)


@triton.jit(do_not_specialize=["chunks"])
def scan_chunks(
    counts_ptr,  # [E, chunks] int32, turned into exclusive prefix sums along the chunks
    totals_ptr,  # [E] int32, written
    chunks,
    BLOCK: tl.constexpr,
):
    """Scan the counts of one expert over the chunks."""
    expert = tl.program_id(0)
    row_ptr = counts_ptr + expert.to(tl.int64) * chunks
    total = 0
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        counts = tl.load(row_ptr + chunk, mask=chunk < chunks, other=0)
        tl.store(row_ptr + chunk, total + tl.cumsum(counts, axis=0) - counts, mask=chunk < chunks)
        total += tl.sum(counts, axis=0)
    tl.store(totals_ptr + expert, total)


@triton.jit(do_not_specialize=["assignments", "num_tiles"])
def place_chunks(
    ids_ptr,  # [T*K] any integer type
    slots_ptr,  # [E] or None, as in route
    before_ptr,  # [E, chunks] int32, from scan_chunks
    totals_ptr,  # [E] int32
    order_ptr,  # [T*K] int32, written
    tiles_ptr,  # [num_tiles, 3] int32, written
    assignments,  # T*K
    num_tiles,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Place the assignments of one chunk; the program after the last chunk writes the tiles."""
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0) - 1
    experts = tl.arange(0, BLOCK_E)
    totals = tl.load(totals_ptr + experts, mask=experts < EXPERTS, other=0)
    if chunk == chunks:
        store_tiles(tiles_ptr, num_tiles, totals, BLOCK_E, BLOCK_M)
        return

    index = chunk * BLOCK + tl.arange(0, BLOCK)
    expert, valid = load_experts(ids_ptr, slots_ptr, index, assignments, EXPERTS)
    first = tl.gather(tl.cumsum(totals, axis=0) - totals, expert, axis=0)
    before = tl.load(before_ptr + expert.to(tl.int64) * chunks + chunk, mask=valid, other=0)
    rank = rank_among_equals(ids_ptr, slots_ptr, chunk * BLOCK, expert, assignments, EXPERTS, BLOCK)
    tl.store(order_ptr + first + before + rank, index, mask=valid)

"""Decide where the experts of each block live.

Needs: blocks.  Adds: placements.  Graph: unchanged.

    expert_memory=None, or enough of it        every block resident
    expert_memory below the experts' bytes     resident all the same, and a miss that says so

Experts that live elsewhere need the expert cache, which this version does not have.
"""

from dataclasses import replace

from moecc.passes.ir import Miss, Outcome, Placement, Program
from moecc.passes.options import Options


def schedule_offload(program: Program, options: Options) -> Outcome:
    """Place every block on its own device, and check the budget against the sum."""
    placements = tuple(
        Placement(block=block.path, home="resident", bytes=block.weight_bytes)
        for block in program.blocks
    )
    total = sum(placement.bytes for placement in placements)
    budget = options.expert_memory
    if isinstance(budget, float):
        budget = int(budget * total)
    note = f"{total / 2**20:,.1f} MiB of experts, all resident"
    placed = replace(program, placements=placements)
    if budget is None or total <= budget:
        return Outcome(program=placed, note=note)
    why = (
        f"expert_memory allows {budget:,} bytes and the experts take {total:,}; "
        "offloading is not in this version, so all stay resident"
    )
    return Outcome(program=placed, misses=(Miss(where="graph", why=why, fallback=True),), note=note)

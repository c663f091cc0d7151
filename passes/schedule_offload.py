"""Say where the experts of each block live.

Needs: blocks.  Adds: placements.  Graph: unchanged.

    experts of a model that moecc.load left on disk    lent: read into slots when they are needed
    all others                                         resident, in the model's own tensors

How many slots each block gets is decided when a model is loaded, before any weight is read
(`moecc.runtime.offload.plan`). A budget for a model that is in memory already would save nothing
until its weights are gone: that is a miss, and says to load it with `moecc.load`.
"""

from dataclasses import replace

from moecc.passes.ir import Miss, Outcome, Placement, Program
from moecc.passes.options import Options


def schedule_offload(program: Program, options: Options) -> Outcome:
    """Place every block, and check the budget against those that are in memory."""
    placements = tuple(
        Placement(
            block=block.path,
            home="lent" if block.gate_up in program.lent else "resident",
            bytes=block.weight_bytes,
        )
        for block in program.blocks
    )
    sums = {
        home: sum(one.bytes for one in placements if one.home == home)
        for home in ("resident", "lent")
    }
    budget, total = options.expert_memory, sums["resident"]
    if isinstance(budget, float):
        budget = int(budget * total)
    sizes = [f"{size / 2**20:,.1f} MiB of experts {home}" for home, size in sums.items() if size]
    placed = replace(program, placements=placements)
    if budget is None or total <= budget or not total:
        return Outcome(program=placed, note=", ".join(sizes))
    why = (
        f"expert_memory allows {budget:,} bytes and the model's own experts take {total:,}, which "
        "are in memory already; load the model with moecc.load(..., expert_memory=...)"
    )
    miss = Miss(where="graph", why=why, fallback=True)
    return Outcome(program=placed, misses=(miss,), note=", ".join(sizes))

"""Say where the experts of each block live.

Needs: blocks.  Adds: placements.  Graph: unchanged.

    experts of a model that moecc.load left on disk    lent: read into slots when they are needed
    all others                                         resident, in the model's own tensors

How many slots each block gets is decided when a model is loaded, before any weight is read
(`moecc.runtime.offload.plan`); compiling with another one is an error (`moecc.lenders`). A budget
for a model that is in memory already saves nothing until its weights are gone, and there has to be
a place to read them from: that is an error, which names `moecc.load` and `moecc.offload`.
"""

from dataclasses import replace

from moecc.passes.ir import Outcome, Placement, Program
from moecc.passes.options import Options
from moecc.runtime.errors import OptionError


def schedule_offload(program: Program, options: Options) -> Outcome:
    """Place every block.

    Raises `OptionError` when the experts that are in memory are more than the budget.
    """
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
    if sums["lent"]:
        sizes.append("slots and policy as the model was loaded")
    placed = replace(program, placements=placements)
    if budget is None or total <= budget or not total:
        return Outcome(program=placed, note=", ".join(sizes))
    raise OptionError(
        f"expert_memory allows {budget:,} bytes and the model's own experts take {total:,}, which "
        "are in memory already; load the model with moecc.load(..., expert_memory=...), or move "
        "them to disk with moecc.offload(model, store=FOLDER, expert_memory=...)"
    )

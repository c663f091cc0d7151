"""Share expert memory among blocks, for `moecc.load` and `moecc plan` alike."""

from collections.abc import Sequence
from pathlib import Path

from moecc.runtime.errors import OptionError
from moecc.runtime.offload.plan import Demand, share_by_benefit, share_slots
from moecc.runtime.offload.recording import Recording, read
from moecc.runtime.offload.trace import Request


def place_experts(
    demands: Sequence[Demand], memory: int | float, trace: str | None
) -> tuple[int, ...]:
    """Give each block its number of slots: where a trace says that they help most, or evenly.

    Raises `OptionError` when the budget is below one token's demand, or the trace is another
    model's.
    """
    if trace is None:
        return share_slots(demands, memory)
    return share_by_benefit(demands, memory, requests_of(read_for(demands, trace)))


def read_for(demands: Sequence[Demand], trace: str) -> Recording:
    """Read a trace of the model whose blocks these are; records may have another size in it.

    Raises `OptionError` when it is another model's.
    """
    recording = read(Path(trace))
    theirs = [(one.name, one.experts) for one in recording.blocks]
    ours = [(one.name, one.experts) for one in demands]
    if theirs != ours:
        raise OptionError(
            f"the trace {trace!r} is of {recording.model!r}, with {len(theirs)} blocks such as "
            f"{theirs[:1]}; this model has {len(ours)} such as {ours[:1]}: record one of its own"
        )
    return recording


def requests_of(recording: Recording) -> list[Request]:
    """List what blocks asked for."""
    return [event for event in recording.events if isinstance(event, Request)]

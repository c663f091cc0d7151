"""A device that is host memory: kernels run at once, copies as late as they may."""

import random
from dataclasses import dataclass, field

import torch


@dataclass
class DryDevice:
    """Holds back each copy until somebody waits for it, or asks about it often enough.

    A target is filled with ones, NaN in every float dtype, when its copy is queued: who reads it
    without waiting shows. So does a source that is written to before its copy ran.
    """

    patience: random.Random = field(default_factory=lambda: random.Random(0))
    log: list[tuple[str, int, int | None]] = field(default_factory=list)
    """`kernel` and the address of a slot that it reads; `mark` and its number; `copy`, the address
    it writes to and the mark that it waits for."""
    late: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    done: int = 0
    marks: int = 0
    pinned: int = 0

    def new_slots(self, count: int, size: int) -> torch.Tensor:
        return torch.full((count, size), 255, dtype=torch.uint8)

    def new_pinned(self, size: int) -> torch.Tensor:
        self.pinned += 1
        return torch.empty(size, dtype=torch.uint8)

    def mark(self) -> int:
        self.marks += 1
        self.log.append(("mark", -self.marks, None))
        return -self.marks

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: int | None) -> int:
        target.fill_(255)
        self.late.append((target, source))
        self.log.append(("copy", target.data_ptr(), after))
        return self.done + len(self.late)

    def hold(self, event: int) -> None:
        self.finish(event)

    def is_done(self, event: int) -> bool:
        if self.patience.random() < 0.3:
            self.finish(self.done + min(1, len(self.late)))
        return event <= self.done

    def finish(self, event: int) -> None:
        while self.done < event:
            target, source = self.late.pop(0)
            target.copy_(source)
            self.done += 1

    def check_order(self) -> None:
        """Hold that no copy begins before the kernels that read its slot are done."""
        read_at: dict[int, int] = {}
        for place, (what, address, after) in enumerate(self.log):
            if what == "kernel":
                read_at[address] = place
            elif what == "copy" and address in read_at:
                assert after is not None
                assert self.log.index(("mark", after, None)) > read_at.pop(address)

"""Price predictions: which of a block's predicted experts are worth reading early.

A guess of rank r (0 is the best) of an expert that is not there comes true with probability p,
measured online for each rank. If it does, a demand later waits less by what the read gets done
until then: the time of a read, but no more than the window between the guess and the demand, less
what is waited for others meanwhile, whose reads go first. It drives out what the demand would have
driven out. If it does not come true, as much was read for nothing, for the rest is cancelled then:
it delays others to the extent that the link is busy anyway, and the expert that it drove out may
be missed. So a guess is worth reading when

    p * gain  >  (1 - p) * (gain * busy  +  regret * read),    gain = min(read, window)

where `regret` is the measured share of experts that were driven out by guesses and asked for soon.
A guess that does not pay is still counted when it is checked, so a rank can come back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


def is_sooner_at_home(compute: float | None, arrival: float | None) -> bool:
    """Tell whether to compute a missing expert in host memory instead of waiting for its copy.

    Both in seconds; None where nothing was measured, and computing is tried first.
    """
    return compute is None or (arrival is not None and compute < arrival)


_WEIGHT = 0.05
"""Of a new observation: about the last twenty count."""
_HOPEFUL = 0.5
"""Assumed before anything is measured, so that guesses get a chance to prove themselves."""


@dataclass(slots=True)
class Governor:
    """What was measured of one block's guesses, in seconds and shares."""

    precision: list[float] = field(default_factory=list[float])
    """By rank: how often the guess came true."""
    window: float | None = None
    """Between a guess and the demand, less what blocks waited meanwhile; None before the first."""
    regret: float = 0.0

    def worth(self, ranks: int, read: float, busy: float) -> list[bool]:
        """Tell for each rank whether to read what is guessed, given a read's time."""
        window = read if self.window is None else self.window
        gain = min(read, window)
        return [
            p * gain > (1 - p) * (gain * busy + self.regret * read)
            for p in (self._precision(rank) for rank in range(ranks))
        ]

    def observe(self, came_true: Sequence[bool | None], window: float) -> None:
        """Compare a ranked guess with what was asked for, `window` seconds later.

        None stands for an expert that was there: what recurs is cached, and is guessed more easily.
        """
        for rank, true in enumerate(came_true):
            if rank == len(self.precision):
                self.precision.append(_HOPEFUL)
            if true is not None:
                self.precision[rank] += _WEIGHT * (true - self.precision[rank])
        before = window if self.window is None else self.window
        self.window = before + _WEIGHT * (window - before)

    def driven_out(self, missed: bool) -> None:
        """Count an expert that a guess drove out: it was asked for soon, or left for good."""
        self.regret += _WEIGHT * (missed - self.regret)

    def _precision(self, rank: int) -> float:
        return self.precision[rank] if rank < len(self.precision) else _HOPEFUL

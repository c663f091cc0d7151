"""Move bytes in simulated time, as `Link` and its readers do: chunks, priorities, shared bandwidth.

A few readers each take the next chunk of the load of highest priority. One read alone gets the
speed of a stream; several share the link's bandwidth.
"""

from dataclasses import dataclass, field

from moecc.runtime.offload.link import READERS
from moecc.runtime.offload.load import CHUNK, DEMAND
from moecc.runtime.offload.profile import LinkSpeed

_POLL = 0.02
"""Seconds at least between two looks at how busy the link is, as `Link` has it."""
_JUST = 0.005
"""Seconds for which reads disturb what computes after them."""
_NEVER = float("inf")


@dataclass(eq=False, slots=True)
class Transfer:
    """One expert on its way."""

    left: int
    """Bytes that no reader has begun with."""
    priority: int
    reading: int = 0
    """Chunks that readers are at."""

    @property
    def done(self) -> bool:
        """It has arrived, or nobody is at it after it was cancelled."""
        return not self.left and not self.reading


@dataclass(eq=False, slots=True)
class _Chunk:
    transfer: Transfer
    left: float
    """Bytes, and what the latency is worth in them."""


@dataclass(eq=False, slots=True)
class SimulatedLink:
    """Loads on their way, and what time it is."""

    speed: LinkSpeed
    now: float = 0.0
    bytes: int = 0
    _waiting: list[Transfer] = field(default_factory=list[Transfer])
    _reading: list[_Chunk] = field(default_factory=list[_Chunk])
    _seconds: float = 0.0
    """In which something was read."""
    _busy: float = 0.0
    _polled: float = 0.0
    _seconds_then: float = 0.0
    _active_at: float = -1.0
    """When something was read last."""

    @property
    def active(self) -> bool:
        """Something is being read."""
        return bool(self._reading)

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second while something was being read; None before the first load."""
        return self.bytes / self._seconds if self.bytes else None

    def busy(self) -> float:
        """Share of the latest time in which something was being read."""
        elapsed = self.now - self._polled
        if elapsed > _POLL:
            share = min(1.0, (self._seconds - self._seconds_then) / elapsed)
            self._busy += 0.2 * (share - self._busy)
            self._polled, self._seconds_then = self.now, self._seconds
        return self._busy

    def submit(self, size: int, priority: int) -> Transfer:
        """Start reading so many bytes."""
        transfer = Transfer(left=size, priority=priority)
        self._waiting.append(transfer)
        self._take()
        return transfer

    def stop(self, transfer: Transfer) -> None:
        """Begin no more chunks of a load."""
        transfer.left = 0

    def cancel(self, transfer: Transfer) -> None:
        """Stop a load; time passes until nobody is at it."""
        self.stop(transfer)
        self.wait(transfer)

    def wait(self, transfer: Transfer) -> None:
        """Let time pass until a load is done; it overtakes those that are only predicted."""
        transfer.priority = DEMAND
        while not transfer.done:
            self._pass(self._next())

    def compute(self, seconds: float, beside: float = 1.0, after: float = 1.0) -> None:
        """Let time pass until so much is computed: more beside reads, and just after them."""
        while seconds > 0:
            lately = self.now - self._active_at < _JUST
            factor = beside if self._reading else after if lately else 1.0
            step = min(seconds * factor, self._next())
            self._pass(step)
            seconds -= step / factor

    def _rate(self) -> float:
        return min(self.speed.stream, self.speed.bandwidth / max(1, len(self._reading)))

    def _next(self) -> float:
        """Say how long it takes until a reader ends its chunk."""
        return min((chunk.left for chunk in self._reading), default=_NEVER) / self._rate()

    def _pass(self, seconds: float) -> None:
        """Let time pass, at most until the next chunk ends."""
        self.now += seconds
        if not self._reading:
            return
        self._seconds += seconds
        self._active_at = self.now
        done = seconds * self._rate()
        for chunk in self._reading:
            chunk.left -= done
        for chunk in [chunk for chunk in self._reading if chunk.left < 0.5]:
            self._reading.remove(chunk)
            chunk.transfer.reading -= 1
        self._take()

    def _take(self) -> None:
        """Let readers take chunks: of the highest priority first, and of these the oldest."""
        while len(self._reading) < READERS:
            self._waiting = [one for one in self._waiting if one.left]
            if not self._waiting:
                return
            transfer = min(self._waiting, key=lambda one: one.priority)
            size = min(CHUNK, transfer.left)
            transfer.left -= size
            transfer.reading += 1
            self.bytes += size
            latency = self.speed.latency * self.speed.stream
            self._reading.append(_Chunk(transfer=transfer, left=size + latency))

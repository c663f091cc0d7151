"""Move bytes from host memory to a device, beside what it computes: streams and events.

A link says what is copied and in which order (`moecc.runtime.offload.device_link`); this is all
that it needs of CUDA. Tests put a device in its place that runs copies as late as it may.
"""

from typing import Any, Protocol

import torch


class Device(Protocol):
    """Two queues: kernels run in one, copies in the other. No call but `finish` waits."""

    def new_slots(self, count: int, size: int) -> torch.Tensor:
        """Allocate uint8 [count, size] on the device."""
        ...

    def new_pinned(self, size: int) -> torch.Tensor:
        """Allocate uint8 [size] on the host, where the device can read it by itself."""
        ...

    def mark(self) -> Any:
        """Give an event: all kernels that were launched so far are done."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any | None) -> Any:
        """Queue a copy to the device behind an event of kernels; give the event of its end."""
        ...

    def hold(self, event: Any) -> None:
        """Let kernels that are launched from now on wait for an event."""
        ...

    def is_done(self, event: Any) -> bool:
        """Tell whether an event has happened."""
        ...

    def finish(self, event: Any) -> None:
        """Wait for an event."""
        ...


class Cuda:
    """A CUDA device, with a stream for copies beside the one that is current."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def new_slots(self, count: int, size: int) -> torch.Tensor:
        """Allocate on the device."""
        return torch.empty(count, size, dtype=torch.uint8, device=self._device)

    def new_pinned(self, size: int) -> torch.Tensor:
        """Allocate page-locked memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> torch.cuda.Event:
        """Record an event in the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        """Copy in the stream of copies."""
        if after is not None:
            self._copies.wait_event(after)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._copies)
        return event

    def hold(self, event: torch.cuda.Event) -> None:
        """Let the current stream wait."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def is_done(self, event: torch.cuda.Event) -> bool:
        """Ask the event."""
        return event.query()

    def finish(self, event: torch.cuda.Event) -> None:
        """Let the host wait."""
        event.synchronize()


def new_device(device: torch.device) -> Device | None:
    """Give what moves bytes to a device; None for the CPU, where nothing has to."""
    return Cuda(device) if device.type == "cuda" else None

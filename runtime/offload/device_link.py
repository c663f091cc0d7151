"""Move experts from host memory into slots on a device.

The device copies by itself, in the order in which copies are queued, so only few are queued at a
time, the others wait here, and what somebody needs goes first. Nobody on the host waits: kernels
are launched at once and wait for their experts on the device. A copy into a slot waits, on the
device too, until the kernels that read what was in it are done.

Experts in memory that the device cannot read by itself go through a ring of pinned records.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moecc.runtime.offload.device import Device
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.load import DEMAND, Load
from moecc.runtime.offload.record import Layout
from moecc.runtime.offload.store import Store

QUEUED = 2
"""Copies that are queued on the device: one is under way, the next one follows without a gap."""


class DeviceLink:
    """What `Link` is for disks. Its owner's pool has the lock."""

    def __init__(self, device: Device, queued: int = QUEUED) -> None:
        self._device, self._most = device, queued
        self._waiting: list[Load] = []
        self._queued: dict[Load, Any] = {}
        """And the event of each one's end."""
        self._read: dict[int, Any] = {}
        """By a slot's address: when the kernels that read it are done."""
        self._ring: deque[tuple[torch.Tensor, Any]] = deque()
        """Pinned records, and when their latest copy is done."""
        self._since = self._seconds = 0.0
        self.bytes = 0
        """Copied so far."""

    def new_slots(self, count: int, layout: Layout) -> tuple[None, torch.Tensor]:
        """Allocate slots; kernels may still run on what the memory was before."""
        slots = self._device.new_slots(count, layout.size)
        self.used(slots)
        return None, slots

    def submit(self, load: Load) -> None:
        """Copy an expert when its turn comes."""
        self._waiting.append(load)
        self._queue_some()

    def promote(self, load: Load) -> None:
        """Let a load overtake those that are only predicted."""
        load.priority = DEMAND

    def arrived(self, load: Load) -> bool:
        """Tell whether an expert is there, without waiting."""
        self._queue_some()
        return load.done

    def wait(self, load: Load) -> None:
        """Let kernels that are launched from now on wait for an expert."""
        if load in self._waiting:
            self._queue(load)
        if load in self._queued:
            self._device.hold(self._queued[load])

    def stop(self, loads: Sequence[Load]) -> None:
        """Drop loads that nobody needs; a copy under way ends before the next into its slot."""
        for load in loads:
            if load in self._waiting:
                self._waiting.remove(load)
            load.stop()

    cancel = stop

    def used(self, slots: Iterable[torch.Tensor]) -> None:
        """Take note that kernels that read these slots have been launched."""
        event = self._device.mark()
        self._read.update({slot.data_ptr(): event for slot in slots})

    def close(self) -> None:
        """Drop what waits, and let the device end what it copies."""
        self.cancel(list(self._waiting))
        for event in self._queued.values():
            self._device.finish(event)
        self._collect()

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second while something was copied; None before the first."""
        running = time.perf_counter() - self._since if self._queued else 0.0
        return self.bytes / (self._seconds + running) if self.bytes else None

    def arrival(self, load: Load) -> float | None:
        """Estimate the seconds until a load is there; None before anything was copied."""
        before = list(self._queued)
        if load in self._waiting:
            before += [one for one in self._waiting if one.priority <= load.priority]
        size = sum(one.store.layout.size for one in before)
        return size / self.bandwidth if self.bandwidth else None

    def busy(self) -> float:
        """Tell whether demands find something under way, 0 or 1."""
        self._collect()
        return float(bool(self._queued))

    def _queue_some(self) -> None:
        self._collect()
        while self._waiting and len(self._queued) < self._most:
            self._queue(min(self._waiting, key=lambda load: load.priority))

    def _queue(self, load: Load) -> None:
        self._waiting.remove(load)
        records = load.store.records
        assert records is not None, "stores of devices are in memory"
        source = records[load.expert]
        after = self._read.pop(load.record.data_ptr(), None)
        if not self._queued:
            self._since = time.perf_counter()
        if load.store.pinned:
            self._queued[load] = self._device.copy(load.record, source, after)
            return
        bounce = self._bounce(len(source))
        bounce.copy_(source)
        self._queued[load] = event = self._device.copy(load.record, bounce, after)
        self._ring.append((bounce, event))

    def _bounce(self, size: int) -> torch.Tensor:
        """Give a pinned record that nobody copies from any more."""
        if len(self._ring) <= self._most:
            return self._device.new_pinned(size)
        held, event = self._ring.popleft()
        self._device.finish(event)
        return held if len(held) == size else self._device.new_pinned(size)

    def _collect(self) -> None:
        """End the loads whose copies are done, in the order of the queue."""
        for load, event in list(self._queued.items()):
            if not self._device.is_done(event):
                return
            del self._queued[load]
            self.bytes += load.store.layout.size
            load.end()
            if not self._queued:
                self._seconds += time.perf_counter() - self._since


def hold_in_memory(store: Store, link: Link, device: Device) -> Store:
    """Read all experts of a block into host memory that a device can read by itself.

    Raises `StoreError` when one cannot be read.
    """
    size = store.layout.size
    records = device.new_pinned(store.experts * size).view(store.experts, size)
    loads = [Load(store, expert, records[expert]) for expert in range(store.experts)]
    for load in loads:
        link.submit(load)
    for load in loads:
        link.wait(load)
    reads = ((),) * store.experts
    return replace(store, reads=reads, checksums=None, records=records, pinned=True)

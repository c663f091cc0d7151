"""Hold slots that blocks share, and bring experts into them."""

import mmap
import os
import threading
import weakref
from collections.abc import Sequence

from moecc.runtime.errors import InputError
from moecc.runtime.offload.cache import Admission, Cache
from moecc.runtime.offload.device_link import DeviceLink
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.load import DEMAND, Load
from moecc.runtime.offload.policy import Key, Policy
from moecc.runtime.offload.record import Layout, up_to
from moecc.runtime.offload.store import Store
from moecc.runtime.offload.trace import Trace


class Pool:
    """Slots for experts of one layout, of one block or of several.

    Calls are made one at a time, by whoever holds `lock`.
    """

    def __init__(self, layout: Layout, slots: int, policy: Policy, link: Link | DeviceLink) -> None:
        """Make room for so many experts; memory is taken as they come."""
        self.layout, self.link = layout, link
        self.lock = threading.RLock()
        self.cache = Cache(slots, policy)
        self.trace = Trace()
        self._memory, self.records = link.new_slots(slots, layout)
        self.tensors = layout.tensors(self.records)
        self._loads: dict[int, Load] = {}
        """Who writes to each slot, or did and nobody has looked since."""
        _pools.add(self)

    @property
    def slots(self) -> int:
        """How many experts fit."""
        return self.cache.slots

    def request(
        self, store: Store, keys: Sequence[Key], then: Sequence[Key] = ()
    ) -> list[Admission]:
        """Admit and pin experts that are about to be used; those that miss are on their way.

        `then` are what the same call asks for next. Raises `InputError` when `keys` do not fit
        beside what is pinned.
        """
        useful = len(self.cache.let_in.intersection(keys))
        self._drop_failed(keys)
        admitted = self.cache.request(keys, then)
        for one in admitted:
            if one.hit and one.slot in self._loads:
                self.link.promote(self._loads[one.slot])
        try:
            self._load(store, admitted, DEMAND)
        except BaseException:
            self.cache.release(keys)
            raise
        self.trace.counts.useful += useful
        return admitted

    def predict(
        self, store: Store, keys: Sequence[Key], due: int, most: int, priority: int | None = None
    ) -> list[Key]:
        """Start loading experts, likeliest first, that a request `due` steps ahead may name.

        Their loads have a `priority`, by default that of `due`. Returns the experts that had to go
        for them.
        """
        self._drop_failed(keys)
        admitted = self.cache.predict(keys, self.cache.step + due, most)
        self._load(store, admitted, DEMAND + due if priority is None else priority)
        self.trace.counts.predicted += len(admitted)
        self.trace.add_guess(tuple(keys))
        return [one.evicted for one in admitted if one.evicted is not None]

    def withdraw(self, block: int, wanted: Sequence[int]) -> None:
        """Stop reading what was predicted for a block that asks for other experts."""
        slots = self.cache.withdraw(block, wanted)
        self.link.stop([self._loads[slot] for slot in slots if slot in self._loads])

    def is_late(self, key: Key) -> bool:
        """Tell whether an admitted expert is still on its way, or failed to come."""
        slot = self.cache.slot(key)
        load = self._loads.get(slot)
        if load is not None and self.link.arrived(load) and not load.failed:
            del self._loads[slot]
            return False
        return load is not None

    def arrival(self, key: Key) -> float | None:
        """Estimate the seconds until a late expert is on the device, if that can be known."""
        assert isinstance(self.link, DeviceLink)
        return self.link.arrival(self._loads[self.cache.slot(key)])

    def wait(self, key: Key) -> None:
        """Wait for an admitted expert; raises `StoreError` if it cannot be read."""
        slot = self.cache.slot(key)
        load = self._loads.get(slot)
        if load is not None:
            self.link.wait(load)
            del self._loads[slot]

    def release(self, admitted: Sequence[Admission]) -> None:
        """Unpin experts; the kernels that read them have been called."""
        self.link.used(self.records[one.slot] for one in admitted)
        self.cache.release(one.key for one in admitted)

    def shrink(self, slots: int) -> None:
        """Give the memory of all but so many slots back.

        Raises `InputError` when an expert in one of them is in use, there are not so many, or they
        are on a device, where memory is given back whole.
        """
        with self.lock:
            if self._memory is None:
                raise InputError("slots on a device cannot be given up one by one")
            self.cache.shrink(slots)
            self._stop([slot for slot in self._loads if slot >= slots])
            rest = up_to(slots * self.layout.size, mmap.PAGESIZE)
            if rest < len(self._memory):
                self._memory.madvise(mmap.MADV_DONTNEED, rest)

    def grow(self, slots: int) -> None:
        """Use slots again that were given up; memory is taken as experts come.

        Raises `InputError` when there never were so many.
        """
        with self.lock:
            if slots > len(self.records):
                raise InputError(f"{slots} slots are more than the {len(self.records)} there were")
            self.cache.grow(slots)

    def _load(self, store: Store, admitted: Sequence[Admission], priority: int) -> None:
        """Start reading those that miss; what cannot be started is not in the cache."""
        missing = [one for one in admitted if not one.hit]
        try:
            self._stop([one.slot for one in missing])
            while missing:
                one = missing[0]
                load = Load(store, one.key[1], self.records[one.slot], priority)
                self.link.submit(load)
                self._loads[one.slot] = load
                del missing[0]
        finally:  # an interrupt while a load stops, or no thread to read
            for one in missing:
                self.cache.drop(one.key)

    def _stop(self, slots: Sequence[int]) -> None:
        """Make sure that nobody writes to slots for experts that left them."""
        leaving = [slot for slot in slots if slot in self._loads]
        self.link.cancel([self._loads[slot] for slot in leaving])
        for slot in leaving:
            del self._loads[slot]

    def _drop_failed(self, keys: Sequence[Key]) -> None:
        """Forget experts whose reading failed, so that they are read anew."""
        for key in keys:
            if key in self.cache:
                load = self._loads.get(self.cache.slot(key))
                if load is not None and self.link.arrived(load) and load.failed:
                    del self._loads[self.cache.slot(key)]
                    self.cache.drop(key)


_pools: "weakref.WeakSet[Pool]" = weakref.WeakSet()
_locked: list[Pool] = []
_forking = threading.Lock()
"""Several threads may fork: each locks and unlocks for itself, links too."""


def _lock_all() -> None:
    """Let running calls end before a fork: a child has no thread that would end them."""
    _forking.acquire()
    for pool in list(_pools):
        pool.lock.acquire()
        _locked.append(pool)


def _unlock_all() -> None:
    while _locked:
        _locked.pop().lock.release()
    _forking.release()


os.register_at_fork(before=_lock_all, after_in_parent=_unlock_all, after_in_child=_unlock_all)

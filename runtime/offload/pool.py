"""Hold slots that blocks share, and bring experts into them."""

import mmap
import threading
from collections.abc import Sequence

from moecc.runtime.offload.cache import Admission, Cache
from moecc.runtime.offload.link import DEMAND, Link, Load
from moecc.runtime.offload.policy import Key, Policy
from moecc.runtime.offload.record import Layout, new_records
from moecc.runtime.offload.store import Store
from moecc.runtime.offload.trace import Trace


class Pool:
    """Slots for experts of one layout, of one block or of several.

    Calls are made one at a time, by whoever holds `lock`.
    """

    def __init__(self, layout: Layout, slots: int, policy: Policy, link: Link) -> None:
        """Make room for so many experts; memory is taken as they come."""
        self.layout, self.link = layout, link
        self.lock = threading.RLock()
        self.cache = Cache(slots, policy)
        self.trace = Trace()
        self._memory, self.records = new_records(slots, layout)
        self.tensors = layout.tensors(self.records)
        self._loads: dict[Key, Load] = {}
        self._foretold: set[Key] = set()

    @property
    def slots(self) -> int:
        """How many experts fit."""
        return self.cache.slots

    def request(self, store: Store, keys: Sequence[Key]) -> list[Admission]:
        """Admit and pin experts that are about to be used; those that miss are on their way.

        Raises `InputError` when they do not fit beside what is pinned.
        """
        self._drop_failed(keys)
        admitted = self.cache.request(keys)
        for one in admitted:
            if not one.hit:
                self._load(store, one, DEMAND)
            elif one.key in self._loads:
                self.link.promote(self._loads[one.key])
        foretold = self._foretold.intersection(keys)
        self.trace.counts.useful += len(foretold)
        self._foretold -= foretold
        return admitted

    def predict(self, store: Store, keys: Sequence[Key], due: int, most: int) -> list[Key]:
        """Start loading experts, likeliest first, that a request `due` steps ahead may name.

        Returns the experts that had to go for them.
        """
        self._drop_failed(keys)
        admitted = self.cache.predict(keys, self.cache.step + due, most)
        for one in admitted:
            self._load(store, one, DEMAND + due)
            self._foretold.add(one.key)
        self.trace.counts.predicted += len(admitted)
        self.trace.add_guess(tuple(keys))
        return [one.evicted for one in admitted if one.evicted is not None]

    def is_late(self, key: Key) -> bool:
        """Tell whether an admitted expert is still on its way."""
        load = self._loads.get(key)
        if load is not None and load.done and load.error is None:
            del self._loads[key]
            return False
        return load is not None

    def wait(self, key: Key) -> None:
        """Wait for an admitted expert; raises `StoreError` if it cannot be read."""
        load = self._loads.get(key)
        if load is not None:
            self.link.wait(load)
            del self._loads[key]

    def shrink(self, slots: int) -> None:
        """Give the memory of all but so many slots back.

        Raises `InputError` when an expert in one of them is in use.
        """
        with self.lock:
            for key in self.cache.shrink(slots):
                self._cancel(key)
            self._memory.madvise(mmap.MADV_DONTNEED, slots * self.layout.size)

    def _load(self, store: Store, admission: Admission, priority: int) -> None:
        if admission.evicted is not None:
            self._cancel(admission.evicted)
        record = self.records[admission.slot]
        load = Load(store, admission.key[1], record, priority)
        self._loads[admission.key] = load
        self.link.submit(load)

    def _cancel(self, key: Key) -> None:
        """Make sure that nobody writes to the slot of an expert that left."""
        self._foretold.discard(key)
        load = self._loads.pop(key, None)
        if load is not None:
            self.link.cancel(load)

    def _drop_failed(self, keys: Sequence[Key]) -> None:
        """Forget experts whose reading failed, so that they are read anew."""
        for key in keys:
            load = self._loads.get(key)
            if load is not None and load.done and (load.error or load.cancelled):
                del self._loads[key]
                self.cache.drop(key)

"""Keep the table of which expert is in which slot: ids only, no tensors, no clocks.

What happens depends on the order of calls alone, not on how fast reads are, so that replaying a
trace gives exactly the hits and misses of the run (`moecc.runtime.offload.replay`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from moecc.runtime.errors import InputError
from moecc.runtime.offload.policy import Key, Policy, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What became of one expert of a request."""

    key: Key
    slot: int
    hit: bool
    """It was there, or on its way; otherwise it has to be read into the slot."""
    evicted: Key | None = None
    """What had the slot before."""


class Cache:
    """Slots and the experts in them. Not thread-safe: its owner has the lock."""

    def __init__(self, slots: int, policy: Policy) -> None:
        self.slots = slots
        self.step = 0
        """Requests so far."""
        self._policy = policy
        self._slot: dict[Key, int] = {}
        self._pins: Counter[Key] = Counter()
        self._free = list(range(slots - 1, -1, -1))
        self._usage = Usage()
        self.let_in: set[Key] = set()
        """By predictions, and not asked for since."""

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    def __iter__(self) -> Iterator[Key]:
        return iter(self._slot)

    def __len__(self) -> int:
        return len(self._slot)

    def slot(self, key: Key) -> int:
        """Give the slot of a cached expert."""
        return self._slot[key]

    def request(self, keys: Sequence[Key], then: Sequence[Key] = ()) -> list[Admission]:
        """Admit experts that are about to be used, all at once, and pin them.

        `then` are those that the same call will ask for next, in this order: of what has to leave,
        they go last, and the latest of them first. Raises `InputError` when `keys` are more than
        slots that nobody uses; nothing changes then.
        """
        wanted = set(keys)
        missing = len(wanted - self._slot.keys())
        room = self.slots - len(self._slot.keys() & (wanted | self._pins.keys()))
        if missing > room:
            raise InputError(
                f"{missing} experts have to come into {room} of {self.slots} slots; the cache "
                "needs a slot for each expert of a token"
            )
        self.step += 1
        for key in keys:
            self._pins[key] += 1  # before anything is evicted
        turns = {key: turn for turn, key in enumerate(then)}
        admitted = [self._admit(key, turns=turns) for key in keys]
        self._usage.use(keys, self.step)
        self.let_in -= wanted
        return admitted

    def release(self, keys: Iterable[Key]) -> None:
        """Unpin experts that are no longer read; one that is not pinned stays so."""
        for key in keys:
            if self._pins[key] > 1:
                self._pins[key] -= 1
            else:
                self._pins.pop(key, None)

    def predict(self, keys: Sequence[Key], due: int, most: int) -> list[Admission]:
        """Admit experts that will likely be requested at step `due`; at most `most` new ones.

        They take free slots and those of experts that score lowest; none that is predicted for
        step `due` or one before it.
        """
        admitted: list[Admission] = []
        for key in keys:
            self._usage.due[key] = due
        for key in keys:
            if key in self._slot or len(admitted) == most:
                continue
            victim = None if self._free else self._victim(spared=due)
            if not self._free and victim is None:
                break
            admitted.append(self._admit(key, victim))
            self._usage.last[key] = self.step
            self.let_in.add(key)
        return admitted

    def withdraw(self, block: int, wanted: Iterable[int]) -> list[int]:
        """Drop what predictions let in for a block that asks for other experts; give the slots.

        It was not worth keeping before, and what was predicted wrongly is read no further.
        """
        wrong = [key for key in self.let_in if key[0] == block and key[1] not in wanted]
        slots = [self._slot[key] for key in sorted(wrong)]
        for key in sorted(wrong):
            self.drop(key)
        return slots

    def drop(self, key: Key) -> None:
        """Forget an expert whose slot holds nothing good."""
        slot = self._slot.pop(key)
        self.let_in.discard(key)
        if slot < self.slots:
            self._free.append(slot)

    def clear(self) -> None:
        """Forget every expert, and what was ever asked for."""
        for key in list(self._slot):
            self.drop(key)
        self._usage = Usage()

    def shrink(self, slots: int) -> list[Key]:
        """Give up the slots from number `slots` on; return the experts that were in them.

        Raises `InputError` if one of those is in use, or there are not so many slots.
        """
        if not 0 < slots <= self.slots:
            raise InputError(f"a cache of {self.slots} slots cannot shrink to {slots}")
        leaving = [key for key, slot in self._slot.items() if slot >= slots]
        if any(self._pins[key] for key in leaving):
            raise InputError("slots cannot be given up while their experts are in use")
        self.slots = slots
        for key in leaving:
            self.drop(key)
        self._free = [slot for slot in self._free if slot < slots]
        return leaving

    def grow(self, slots: int) -> None:
        """Have so many slots; the new ones are empty. Raises `InputError` if there are more."""
        if slots < self.slots:
            raise InputError(f"a cache of {self.slots} slots cannot grow to {slots}")
        self._free = [*range(slots - 1, self.slots - 1, -1), *self._free]
        self.slots = slots

    def _admit(
        self, key: Key, evicted: Key | None = None, turns: Mapping[Key, int] = MappingProxyType({})
    ) -> Admission:
        if key in self._slot:
            return Admission(key=key, slot=self._slot[key], hit=True)
        if not self._free:
            evicted = evicted or self._victim(turns=turns)
            assert evicted is not None
            self.drop(evicted)
        self._slot[key] = slot = self._free.pop()
        return Admission(key=key, slot=slot, hit=False, evicted=evicted)

    def _victim(
        self, spared: int | None = None, turns: Mapping[Key, int] = MappingProxyType({})
    ) -> Key | None:
        """Give the unpinned expert of lowest score; none that is predicted up to step `spared`.

        Those whose turn comes later in this call have the highest, the next one most.
        """
        unused = (
            key
            for key in self._slot
            if not self._pins[key] and (spared is None or not self._needed_before(key, spared))
        )

        def score(key: Key) -> tuple[float, ...]:
            if key in turns:
                return 1.0, -turns[key]
            return 0.0, *self._policy(key, self._usage, self.step)

        return min(unused, key=score, default=None)

    def _needed_before(self, key: Key, due: int) -> bool:
        return self.step < self._usage.due.get(key, -1) <= due

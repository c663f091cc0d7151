"""Lend a block's experts to its kernel, wherever they are.

A block's top-k is one request: the experts that are there compute while the others arrive, in
ascending order, so that the sum has the bits of a call with all experts in memory. When a call
needs more experts than there are slots, as in prefill, it takes them in groups of a quarter of the
slots, and reads one group while it computes the other; each expert is read once, and what was there
already stays until it is computed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from moecc.runtime.offload.cache import Admission
from moecc.runtime.offload.guesses import Guesses
from moecc.runtime.offload.home import Home
from moecc.runtime.offload.load import DEMAND
from moecc.runtime.offload.policy import Key
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.replay import groups_of
from moecc.runtime.offload.slot_table import SlotTable
from moecc.runtime.offload.stand_in import lender_of
from moecc.runtime.offload.store import Store
from moecc.runtime.offload.token_memory import TokenMemory
from moecc.runtime.offload.trace import Request
from moecc.runtime.offload.trial import MOST_TOKENS
from moecc.runtime.ops import AddExpertsFn
from moecc.runtime.schemes.scheme import Schemes
from moecc.runtime.twins import is_foreseen

WIDEN = 2
"""Guesses are ranked this many times as far as top-k, for those that just missed it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bank:
    """The experts of one block: on disk, and in the slots of a pool."""

    number: int
    """Of the block, among those of its model, in the order of its layers."""
    store: Store
    pool: Pool
    schemes: Schemes | None = None
    """Of the matrices in the store; None are the model's own."""
    guesses: Guesses = field(default_factory=Guesses)
    memory: TokenMemory = field(default_factory=TokenMemory)
    home: Home | None = None
    """Computes experts in host memory when that is sooner than their copy to a device."""
    _table: SlotTable = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_table", SlotTable(self.store.experts))

    def run(
        self,
        add: AddExpertsFn,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *biases: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the block; `add` is its kernel, shapes are those of `ExpertsFn`.

        Raises `StoreError` when an expert cannot be read; the next call is not affected.
        """
        wanted = self._experts(ids)
        if self.number == 0:
            self.guesses.trial.begin(len(hidden), foreseen=is_foreseen())
        onto = self._zeros(hidden)
        with self.pool.lock:
            groups = groups_of(wanted, self.pool.slots)
            double = len(groups) > 1 and 2 * len(groups[0]) <= self.pool.slots
            missing = [key for key in self._keys(wanted) if key not in self.pool.cache]
            self.guesses.check(wanted, missing)
            self.memory.learn(ids)
            self.pool.withdraw(self.number, wanted)
            hits = late = 0
            pinned: list[Admission] = []
            try:
                ahead = self._request(groups, 0, pinned)
                for number in range(len(groups)):
                    current = ahead
                    hits += sum(one.hit for one in current)
                    late += sum(one.hit and self.pool.is_late(one.key) for one in current)
                    if double:
                        ahead = self._request(groups, number + 1, pinned)
                    self._add(add, wanted, current, onto, hidden, ids, weights, *biases)
                    self._release(current, pinned)
                    if not double:
                        ahead = self._request(groups, number + 1, pinned)
            finally:
                self._release(list(pinned), pinned)
            request = Request(
                block=self.number, tokens=len(hidden), experts=tuple(wanted), hits=hits
            )
            self.pool.trace.add(request, late)
        return onto.to(hidden.dtype)

    def sketch(
        self,
        add: AddExpertsFn,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *biases: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the block with the experts that are there, and start reading the others.

        What is missing adds nothing: good enough for a draft.
        """
        named, onto = self._experts(ids), self._zeros(hidden)
        with self.pool.lock:
            self.foresee(ids)
            cache, tensors = self.pool.cache, self.pool.tensors
            keys = [key for key in self._keys(named) if key in cache]
            slots = {key[1]: cache.slot(key) for key in keys if not self.pool.is_late(key)}
            table = self._table.show(slots, named, onto.device)
            experts = (tensors["gate_up"], tensors["down"], *biases, tensors.get("up"))
            add(onto, table, hidden, ids, weights, *experts)
            self.pool.link.used(self.pool.records[slot] for slot in slots.values())
        return onto.to(hidden.dtype)

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Start reading what the best of `scores` [T, E] name, as far as it is worth it.

        For a few tokens only: a prefill needs most experts anyway, and reads them in order.
        """
        if not 0 < len(scores) <= MOST_TOKENS:
            return
        width = min(WIDEN * active, self.store.experts)
        best = scores.float().amax(dim=0) if len(scores) > 1 else scores[0]
        ranked = self._keys(cast(list[int], best.topk(width).indices.tolist()))
        with self.pool.lock:
            self.guesses.make(ranked, active, self.pool, self.store)

    def recall(self, tokens: torch.Tensor, active: int) -> None:
        """Start reading what these tokens [T] chose before, as far as it is worth it."""
        with self.pool.lock:
            ranked = self._keys(self.memory.recall(cast(list[int], tokens.tolist())))
            if ranked and len(tokens) <= MOST_TOKENS:
                self.guesses.make(ranked, active, self.pool, self.store)

    def foresee(self, ids: torch.Tensor) -> None:
        """Start reading the experts that a draft named: the next call will ask for them.

        They keep their slots until then; those of earlier blocks are read first.
        """
        with self.pool.lock:
            named = self._keys(self._experts(ids))
            self.pool.predict(self.store, named, 1, len(named), DEMAND + 1 + self.number)

    def _request(
        self, groups: Sequence[Sequence[int]], number: int, pinned: list[Admission]
    ) -> list[Admission]:
        """Ask for a group, if there are so many, and say what comes after it."""
        if number >= len(groups):
            return []
        then = [expert for group in groups[number + 1 :] for expert in group]
        admitted = self.pool.request(self.store, self._keys(groups[number]), self._keys(then))
        pinned += admitted
        return admitted

    def _release(self, admitted: list[Admission], pinned: list[Admission]) -> None:
        self.pool.release(admitted)
        done = {one.key for one in admitted}
        pinned[:] = [one for one in pinned if one.key not in done]

    def _add(
        self,
        add: AddExpertsFn,
        wanted: Sequence[int],
        admitted: Sequence[Admission],
        onto: torch.Tensor,
        *tokens: torch.Tensor | None,
    ) -> None:
        """Add what a group of the `wanted` gives: what is there, up to the first that is not."""
        *inputs, gate_up_bias, down_bias = tokens
        tensors = self.pool.tensors
        experts = (tensors["gate_up"], tensors["down"], gate_up_bias, down_bias, tensors.get("up"))
        start = 0
        while start < len(admitted):
            if self._is_sooner_at_home(admitted[start].key, len(onto)):
                assert self.home is not None
                self.home.run(onto, admitted[start].key[1], self.store, *tokens)
                self.pool.trace.counts.home += 1
                start += 1
                continue
            if self.pool.is_late(admitted[start].key):
                began = time.perf_counter()
                self.pool.wait(admitted[start].key)
                waited = time.perf_counter() - began
                self.pool.trace.add_wait(waited, admitted[start].hit)
                self.guesses.trial.waited += waited
            end = start + 1
            while end < len(admitted) and not self.pool.is_late(admitted[end].key):
                end += 1
            slots = {one.key[1]: one.slot for one in admitted[start:end]}
            add(onto, self._table.show(slots, wanted, onto.device), *inputs, *experts)
            start = end

    def _zeros(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(self.store.layout.parts[0].dtype, torch.float32)
        return hidden.new_zeros(hidden.shape, dtype=wide)

    def _is_sooner_at_home(self, key: Key, tokens: int) -> bool:
        if self.home is None or not self.pool.is_late(key):
            return False
        return self.home.is_sooner(tokens, self.pool.arrival(key))

    def _keys(self, experts: Sequence[int]) -> list[Key]:
        return [(self.number, expert) for expert in experts]

    def _experts(self, ids: torch.Tensor) -> list[int]:
        """List the experts that a call names, ascending."""
        named = set(cast(list[int], ids.reshape(-1).tolist()))
        return sorted(expert for expert in named if 0 <= expert < self.store.experts)


def is_lent(weight: object) -> bool:
    """Tell whether a tensor stands in for experts on disk."""
    return isinstance(weight, torch.Tensor) and isinstance(lender_of(weight), Bank)

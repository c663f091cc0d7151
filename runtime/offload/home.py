"""Compute an expert where it is, in host memory, when that is sooner than to copy it to a device.

For few tokens an expert's weights are read once and little is computed, which a CPU does about as
fast as a bus moves them (Kamahori et al., "Fiddler", 2024).
"""

import time
from dataclasses import dataclass, field

import torch

from moecc.runtime.offload.governor import is_sooner_at_home
from moecc.runtime.offload.store import Store
from moecc.runtime.ops import AddExpertsFn

_WEIGHT = 0.2
"""Of a new measurement."""


@dataclass(slots=True, kw_only=True)
class Home:
    """The host's kernel for a block's experts, and how long it takes."""

    add: AddExpertsFn
    _seconds: dict[int, float] = field(default_factory=dict[int, float])
    """For one expert, by the magnitude of the number of tokens."""

    def is_sooner(self, tokens: int, arrival: float | None) -> bool:
        """Tell whether to compute here what arrives there in so many seconds."""
        return is_sooner_at_home(self._seconds.get(tokens.bit_length()), arrival)

    def run(
        self, onto: torch.Tensor, expert: int, store: Store, *tokens: torch.Tensor | None
    ) -> None:
        """Add what one expert gives to `onto`, on the device; inputs are those of a bank."""
        began = time.perf_counter()
        assert store.records is not None, "stores of devices are in memory"
        host = onto.cpu()
        *inputs, gate_up_bias, down_bias = (None if one is None else one.cpu() for one in tokens)
        table = torch.full((store.experts,), -1)
        table[expert] = expert
        weights = store.layout.tensors(store.records)
        experts = (weights["gate_up"], weights["down"], gate_up_bias, down_bias, weights.get("up"))
        self.add(host, table, *inputs, *experts)
        if host is not onto:
            onto.copy_(host)
        seconds, size = time.perf_counter() - began, len(onto).bit_length()
        before = self._seconds.get(size, seconds)
        self._seconds[size] = before + _WEIGHT * (seconds - before)

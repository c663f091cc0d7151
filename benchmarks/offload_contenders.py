"""What `benchmarks.offload` puts behind a model's experts, and accelerate beside it."""

import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moecc.generate import Timing, generate
from moecc.lenders import bound_to
from moecc.links import new_link
from moecc.runtime.errors import MissingExtra
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.guesses import Guesses
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.policy import POLICIES
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.stand_in import Lender
from moecc.runtime.offload.store import Store
from moecc.runtime.offload.trace import Event
from moecc.runtime.offload.trial import Trial
from moecc.timed_bank import Call, TimedBank


class OnDemand:
    """A bank that ignores predictions."""

    schemes = None

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def run(self, *arguments: Any) -> torch.Tensor:
        """Compute the block."""
        return self.bank.run(*arguments)

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Ignore predictions."""

    def recall(self, tokens: torch.Tensor, active: int) -> None:
        """Ignore what tokens chose before."""


class NoCache(OnDemand):
    """A bank that also forgets its experts after every call."""

    def run(self, *arguments: Any) -> torch.Tensor:
        """Compute the block, and forget."""
        out = self.bank.run(*arguments)
        for key in list(self.bank.pool.cache):
            self.bank.pool.cache.drop(key)
        return out


CONTENDERS: dict[str, tuple[str, Callable[[Bank], Lender]]] = {
    "no cache": ("lru", NoCache),
    "lru": ("lru", OnDemand),
    "lfu": ("lfu", OnDemand),
    "lru + prefetch": ("lru", lambda bank: bank),
    "lfu + prefetch": ("lfu", lambda bank: bank),
}
"""Policy, and what is made of a bank."""


@dataclass(slots=True, kw_only=True)
class Contender:
    """One contender's banks, and what they did."""

    name: str
    banks: list[Bank]
    link: Link
    events: list[Event] = field(default_factory=list[Event])
    calls: list[Call] = field(default_factory=list[Call])
    timings: list[Timing] = field(default_factory=list[Timing])
    read_bytes: int = 0

    def lender(self, bank: Bank) -> Lender:
        """Give what stands for one of the model's own banks."""
        own = self.banks[bank.number]
        return TimedBank(bank=own, calls=self.calls, lender=CONTENDERS[self.name][1](own))

    def round(self, model: Any, ids: torch.Tensor, new_tokens: int) -> None:
        """Generate once; the first time is not counted."""
        warm = bool(self.banks[0].pool.trace.recording)
        before = self.link.bytes
        with bound_to(model, self.lender):
            timing = generate(model, ids, new_tokens)
        if warm:
            self.timings.append(timing)
            self.read_bytes += self.link.bytes - before
        else:
            self.calls.clear()
        for bank in self.banks:
            bank.pool.trace.recording, bank.pool.trace.events = True, self.events


def new_contender(
    name: str, stores: Sequence[Store], slots: int, limit: float | None = None
) -> Contender:
    """Give a contender banks of its own, with so many slots each, and a link of its own."""
    link, trial = new_link(limit=limit), Trial()
    banks = [
        Bank(
            number=number,
            store=store,
            pool=Pool(store.layout, slots, POLICIES[CONTENDERS[name][0]], link),
            guesses=Guesses(trial=trial),
        )
        for number, store in enumerate(stores)
    ]
    return Contender(name=name, banks=banks, link=link)


def run_accelerate(folder: Path, memory: int, ids: torch.Tensor, new_tokens: int) -> Timing:
    """Generate with accelerate's `device_map`, which may keep `memory` bytes of all weights.

    Layers that do not fit are read from disk whenever they run. The files leave the page cache
    before each token, as moecc's direct reads never enter it. Raises `MissingExtra` without
    accelerate.
    """
    try:
        importlib.import_module("accelerate")
    except ImportError as error:
        raise MissingExtra("this contender needs accelerate: pip install accelerate") from error
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(dir=folder.parent) as offloaded:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": memory}, offload_folder=offloaded
        ).eval()

        def leave_page_cache(*_: Any) -> None:
            _leave_page_cache(folder)
            _leave_page_cache(Path(offloaded))

        model.register_forward_pre_hook(leave_page_cache)
        generate(model, ids, 2)
        return generate(model, ids, new_tokens)


def _leave_page_cache(folder: Path) -> None:
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)  # what is not written yet cannot leave
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)

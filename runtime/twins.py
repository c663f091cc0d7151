"""Let blocks compute with copies of their experts while a draft runs.

A draft is the model itself on low-bit copies of its experts, and shares all else with it (MoE-SpeQ,
arXiv 2511.14102). The copy of a block is found by the address of its weights, so that every road to
`moecc::experts` takes it. Only the thread that drafts sees copies.
"""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from moecc.runtime.offload.stand_in import Lender


@dataclass(slots=True)
class Twins:
    """The copies of a model's experts."""

    lenders: dict[int, Lender] = field(default_factory=dict[int, Lender])
    """By the address of a block's first weights."""
    missing: int = 0
    """Calls, while a draft ran, of blocks that have no copy: these ran on their own weights."""


class _Thread(threading.local):
    twins: Twins | None = None
    foreseen: bool = False


_thread = _Thread()


def twin_of(weight: torch.Tensor) -> Lender | None:
    """Give what computes a block instead of its own experts; None when no draft runs here."""
    twins = _thread.twins
    if twins is None:
        return None
    found = twins.lenders.get(weight.data_ptr())
    twins.missing += found is None
    return found


def is_foreseen() -> bool:
    """Tell whether a draft has named, or is naming, the experts of the pass that runs here."""
    return _thread.foreseen


@contextmanager
def drafting(twins: Twins) -> Generator[None]:
    """Let the model's blocks in this thread compute with their copies inside."""
    before = _thread.twins, _thread.foreseen
    _thread.twins, _thread.foreseen = twins, True
    try:
        yield
    finally:
        _thread.twins, _thread.foreseen = before


@contextmanager
def foreseen() -> Generator[None]:
    """Let passes in this thread make no guesses inside: a draft has named their experts."""
    before, _thread.foreseen = _thread.foreseen, True
    try:
        yield
    finally:
        _thread.foreseen = before

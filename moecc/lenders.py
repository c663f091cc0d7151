"""Find what lends a model its experts, and tell where they live and how the cache did."""

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from moecc.passes.options import Options
from moecc.runtime.errors import OptionError
from moecc.runtime.modules import named_modules, parameters_of
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.guesses import Guesses
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.resident import Resident
from moecc.runtime.offload.stand_in import Lender, bind, lender_of
from moecc.runtime.offload.trace import Counts
from moecc.runtime.schemes.scheme import Schemes

_DEFAULTS = Options()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsReport:
    """Experts that are not the model's own tensors."""

    blocks: tuple[dict[str, Any], ...]
    """path, home (`memory`, `disk`, or `host`, beside a device), schemes, experts, slots,
    slot_bytes, requests, asked, hits, misses, late, predicted, useful, wait_seconds, late_seconds;
    and of guesses, None before the first: recall (of the experts asked for, those among the first k
    guessed), wide_recall (among all that were guessed), whole (requests whose experts were all
    among the first k)"""
    memory_bytes: int
    """Of all slots."""
    total_bytes: int
    """Of all experts."""
    read_bytes: int
    """From disk so far."""
    read_bandwidth: float | None
    """Bytes a second while something was read."""
    readers: str | None
    """`native`, or `python`: threads that take turns with the model's Python code, where there is
    no compiler; None beside a device"""
    guesses: dict[str, Any] | None
    """Whether blocks act on guesses now (`on`), and the seconds of a decoding step `with` them and
    `without`, None where that is not known yet; None before the first guess"""

    def total(self, name: str) -> float:
        """Add up one number of all blocks."""
        return sum(block[name] for block in self.blocks)

    @property
    def hit_rate(self) -> float:
        """Experts that were in a slot, or on their way, over experts asked for."""
        asked = self.total("asked")
        return self.total("hits") / asked if asked else 1.0


def lenders_of(model: nn.Module) -> list[tuple[str, Lender]]:
    """List lenders in the order of the model's modules, with the paths of blocks."""
    found: dict[int, tuple[str, Lender]] = {}
    for path, module in named_modules(model):
        for parameter in parameters_of(module).values():
            lender = None if parameter is None else lender_of(parameter)
            if lender is not None:
                name = lender.store.name if isinstance(lender, Bank) else path
                found.setdefault(id(lender), (name, lender))
    return list(found.values())


def banks_of(model: nn.Module) -> list[Bank]:
    """List the banks behind a model's experts, in the order of its layers."""
    return [lender for _, lender in lenders_of(model) if isinstance(lender, Bank)]


@contextmanager
def bound_to(model: nn.Module, wrap: Callable[[Bank], Lender]) -> Generator[None]:
    """Let a model ask other lenders inside, each made of a bank, as it asked that before."""
    bound = [
        (parameter, lender)
        for _, module in named_modules(model)
        for parameter in parameters_of(module).values()
        if parameter is not None and isinstance(lender := lender_of(parameter), Bank)
    ]
    lenders = {id(bank): wrap(bank) for _, bank in bound}
    try:
        for parameter, bank in bound:
            bind(parameter, lenders[id(bank)])
        yield
    finally:
        for parameter, bank in bound:
            bind(parameter, bank)


_SETTLED = ("expert_memory", "policy", "trace", "misses", "expert_parallel", "tokens")
"""Options that are decided when experts are lent."""
_lent_with: "weakref.WeakKeyDictionary[nn.Module, Options]" = weakref.WeakKeyDictionary()


def settle(model: nn.Module, options: Options) -> None:
    """Remember with which options a model's experts were lent."""
    _lent_with.update(dict.fromkeys(model.modules(), options))  # each may be compiled by itself


def check_settled(model: nn.Module, options: Options) -> None:
    """Raise `OptionError` when a model is compiled for what its lent experts are not."""
    lenders = lenders_of(model)
    lent_with = _lent_with.get(model, options)
    for name in _SETTLED if lenders else ():
        wanted, has = getattr(options, name), getattr(lent_with, name)
        if wanted not in (getattr(_DEFAULTS, name), has):
            raise OptionError(
                f"{name}={wanted!r}, but the model was loaded with {has!r}, which compiling does "
                "not change; leave it out, or load the model with it"
            )
    for path, lender in lenders if options.quantize is not None else ():
        if options.budget:
            raise _loaded_otherwise(path, lender, options)
        check_schemes(path, options.schemes(path), lender, options)


def check_schemes(path: str, wanted: Schemes | None, lender: Lender, options: Options) -> None:
    """Raise `OptionError` when a block is compiled for schemes that its lent experts do not have.

    No schemes are what `quantize` says of blocks that it does not name.
    """
    if wanted not in (None, lender.schemes):
        raise _loaded_otherwise(path, lender, options)


def _loaded_otherwise(path: str, lender: Lender, options: Options) -> OptionError:
    has = lender.schemes or "the model's own dtype"
    return OptionError(
        f"quantize={options.quantize!r}, but the experts of {path!r} were loaded in {has}; "
        "leave it out, or load the model with it"
    )


def report_experts(model: nn.Module) -> ExpertsReport | None:
    """Report on experts that are lent; None when a model has all its own."""
    lenders = lenders_of(model)
    if not lenders:
        return None
    links = {id(bank.pool.link): bank.pool.link for bank in banks_of(model)}
    seconds = [link.bandwidth for link in links.values() if link.bandwidth]
    blocks = tuple(_block(path, lender) for path, lender in lenders)
    return ExpertsReport(
        blocks=blocks,
        memory_bytes=sum(block["slots"] * block["slot_bytes"] for block in blocks),
        total_bytes=sum(block["experts"] * block["slot_bytes"] for block in blocks),
        read_bytes=sum(link.bytes for link in links.values()),
        read_bandwidth=max(seconds, default=None),
        readers=max(
            (link.readers for link in links.values() if isinstance(link, Link)), default=None
        ),
        guesses=_trial(banks_of(model)),
    )


def _block(path: str, lender: Lender) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "path": path,
        "schemes": str(lender.schemes) if lender.schemes else None,
    }
    if isinstance(lender, Bank):
        counts = lender.pool.trace.counts
        slots, experts, size = lender.pool.slots, lender.store.experts, lender.store.layout.size
        home = "disk" if lender.store.records is None else "host"
        counted = asdict(counts)
        asked = counted.pop("experts")
        numbers = counted | {"asked": asked, "misses": counts.misses} | _accuracy(lender.guesses)
        return (
            plain | {"home": home, "experts": experts, "slots": slots, "slot_bytes": size} | numbers
        )
    assert isinstance(lender, Resident)
    experts = len(lender.slots)
    size = sum(tensor[0].nbytes for tensor in lender.tensors.values())
    numbers: dict[str, Any] = dict.fromkeys(("asked", "misses", *asdict(Counts())), 0)
    del numbers["experts"]
    numbers |= dict.fromkeys(("recall", "wide_recall", "whole"))
    place = {"home": "memory", "experts": experts, "slots": len(lender.held), "slot_bytes": size}
    return plain | place | numbers


def _trial(banks: Sequence[Bank]) -> dict[str, Any] | None:
    if not any(bank.guesses.made for bank in banks):
        return None
    trial = banks[0].guesses.trial
    with_them, without = (trial.seconds.get(side) for side in (True, False))
    return {"on": trial.on, "with": with_them, "without": without}


def _accuracy(guesses: Guesses) -> dict[str, float | None]:
    asked, made = guesses.asked or None, guesses.made or None
    return {
        "recall": asked and guesses.right / asked,
        "wide_recall": asked and guesses.wide / asked,
        "whole": made and guesses.whole / made,
    }

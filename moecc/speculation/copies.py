"""Make the low-bit copies of a model's experts that a draft computes with."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from moecc.checkpoint.recipes import lay_out, layout_of
from moecc.codegen.emit import adder_of, spec_of
from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError, OptionError, UnsupportedSpec
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.load import Load
from moecc.runtime.offload.record import Layout, new_records
from moecc.runtime.offload.resident import Resident
from moecc.runtime.offload.stand_in import Lender, lender_of
from moecc.runtime.ops import AddExpertsFn
from moecc.runtime.schemes.packing import unpack_experts
from moecc.runtime.schemes.scheme import Scheme, Schemes
from moecc.runtime.twins import Twins
from moecc.runtime.watch import Use

_log = logging.getLogger("moecc.speculate")

Matrices = dict[str, torch.Tensor]
"""Of one expert [1, ., .], by the names of a record."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Twin:
    """A block's copy, which tells the block's cache what the draft asks for."""

    copy: Resident
    bank: Bank | None
    slots: int = 0
    """That the bank gave up."""
    bytes: int = 0

    @property
    def schemes(self) -> Schemes | None:
        """Of the copy."""
        return self.copy.schemes

    def run(
        self,
        add: AddExpertsFn,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *biases: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the block with the copy, while the experts themselves are read."""
        if self.bank is not None:
            self.bank.foresee(ids)
        return self.copy.run(add, hidden, ids, weights, *biases)

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Do nothing: a draft names the experts themselves."""

    def recall(self, tokens: torch.Tensor, active: int) -> None:
        """Do nothing, likewise."""


def add_copies(twins: Twins, uses: Sequence[Use], scheme: Scheme) -> int:
    """Copy the experts of those blocks that have no copy yet; returns the bytes of new copies.

    `uses` are what a pass through the model read. Blocks whose kernels read no copies get none.
    With `expert_memory`, each block's cache gives up the bytes of its copy. Raises `OptionError`
    when it cannot, `StoreError` when an expert cannot be read, `InputError` when nothing ran on
    moecc's kernels.
    """
    plans = _plans(twins, uses, scheme)
    for place, plan in plans.items():
        pool = None if plan.bank is None else plan.bank.pool
        if pool is not None:  # before there is a copy: memory stays within the budget
            pool.shrink(pool.slots - plan.slots)
        try:
            twins.lenders[place] = _copied(plan)
        except BaseException:
            if pool is not None:
                pool.grow(pool.slots + plan.slots)
            raise
    made = sum(plan.bytes for plan in plans.values())
    if made:
        _log.info("copied the experts of %d blocks: %.1f MB", len(plans), made / 1e6)
    return made


def remove_copies(twins: Twins) -> int:
    """Give banks the slots back that copies took; returns the bytes of copies that went."""
    removed = 0
    for place, twin in list(twins.lenders.items()):
        if isinstance(twin, Twin) and twin.bank is not None:
            del twins.lenders[place]
            twin.bank.pool.grow(twin.bank.pool.slots + twin.slots)
            removed += twin.bytes
    _log.info("gave %.1f MB of copies back to the cache", removed / 1e6)
    return removed


def price_of(twins: Twins, uses: Sequence[Use], scheme: Scheme) -> float:
    """Estimate the seconds to copy what `add_copies` would, and to read the slots it takes again.

    0 where no cache gives up slots. Copies one expert twice, since the first time may be slower.
    Raises what `add_copies` raises.
    """
    banked = [plan for plan in _plans(twins, uses, scheme).values() if plan.bank is not None]
    seconds = 0.0
    for plan in 2 * banked[:1]:
        began = time.perf_counter()
        spec, matrices = next(_experts(plan))
        lay_out(matrices, plan.layout, spec, plan.schemes)
        seconds = time.perf_counter() - began
    return seconds * sum(plan.spec.experts + plan.slots for plan in banked)


def _plans(twins: Twins, uses: Sequence[Use], scheme: Scheme) -> "dict[int, _Plan]":
    """Plan the copies of blocks that have none, by the address of their weights."""
    if not uses:
        raise InputError(
            "no experts of this model run on moecc's kernels, so there is nothing to draft with: "
            "load it with moecc.load, or compile it with backend='moecc'"
        )
    new = {use.gate_up.data_ptr(): use for use in uses}
    new = {place: use for place, use in new.items() if place not in twins.lenders}
    plans = {place: plan for place, use in new.items() if (plan := _plan(use, scheme)) is not None}
    for plan in plans.values():
        _check_room(plan)
    return plans


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    use: Use
    spec: KernelSpec
    lender: Lender | None
    schemes: Schemes
    layout: Layout
    """Of the copy."""

    @property
    def bank(self) -> Bank | None:
        return self.lender if isinstance(self.lender, Bank) else None

    @property
    def bytes(self) -> int:
        return self.spec.experts * self.layout.size

    @property
    def slots(self) -> int:
        """That the bank has to give up."""
        return 0 if self.bank is None else -(-self.bytes // self.bank.store.layout.size)


def _plan(use: Use, scheme: Scheme) -> _Plan | None:
    spec, schemes = spec_of(use.kernel), Schemes(first=scheme, second=scheme)
    lender = lender_of(use.gate_up)
    if use.gate_up.device.type != "cpu":
        raise OptionError(
            "drafts on low-bit copies run on CPUs so far; draft with another model: "
            "moecc.speculate(draft=assistant)"
        )
    try:
        adder_of(spec, "auto", schemes)
    except UnsupportedSpec as error:
        _log.warning("%s runs on its own weights in drafts: %s", spec.key, error)
        return None
    if spec.learned:
        _log.warning("%s runs on its own weights in drafts: it multiplies by a vector", spec.key)
        return None
    layout = layout_of(use.tensors, spec, schemes)
    return _Plan(
        use=use,
        spec=spec,
        lender=lender,
        schemes=schemes,
        layout=layout,
    )


def _check_room(plan: _Plan) -> None:
    """Raise `OptionError` when a cache cannot give up what the copy takes."""
    if plan.bank is None or plan.bank.pool.slots - plan.slots >= plan.use.active:
        return
    bank, least = plan.bank, plan.use.active * plan.bank.store.layout.size + plan.bytes
    raise OptionError(
        f"the draft's copies in {plan.schemes} take {plan.bytes / 1e6:.1f} MB of the "
        f"{bank.pool.slots * bank.store.layout.size / 1e6:.1f} MB that {bank.store.name!r} has for "
        f"experts, and a token needs {plan.use.active} of them: load the model with at least "
        f"{least / 1e6:.1f} MB of expert_memory a block, or draft with fewer bits"
    )


def _copied(plan: _Plan) -> Twin:
    _, records = new_records(plan.spec.experts, plan.layout)
    for number, (spec, matrices) in enumerate(_experts(plan)):
        records[number] = lay_out(matrices, plan.layout, spec, plan.schemes)
    copy = Resident.of(
        plan.layout.tensors(records), range(len(records)), len(records), plan.schemes
    )
    return Twin(copy=copy, bank=plan.bank, slots=plan.slots, bytes=plan.bytes)


def _experts(plan: _Plan) -> Iterator[tuple[KernelSpec, Matrices]]:
    """Give the matrices of one expert after the other, and how they are laid out."""
    packed = plan.lender.schemes if plan.lender is not None else None
    spec = plan.spec
    if packed is not None:
        order = {"interleaved": False, "transposed": False, "down_transposed": False}
        spec = replace(spec, split=spec.gated, **order)
    for number in range(spec.experts):
        if isinstance(plan.lender, Bank):
            parts = _read(plan.lender, number)
        else:
            lent = plan.lender
            tensors = lent.tensors if isinstance(lent, Resident) else plan.use.tensors
            parts = {name: one.detach()[number : number + 1] for name, one in tensors.items()}
        yield spec, parts if packed is None else _unpacked(parts, spec, packed)


def _read(bank: Bank, expert: int) -> Matrices:
    """Read an expert past the cache; raises `StoreError`."""
    record = torch.empty(bank.store.layout.size, dtype=torch.uint8)
    load = Load(bank.store, expert, record)
    with bank.pool.lock:
        bank.pool.link.submit(load)
        bank.pool.link.wait(load)
    return bank.store.layout.tensors(record.unsqueeze(0))


def _unpacked(parts: Matrices, spec: KernelSpec, schemes: Schemes) -> Matrices:
    """Give back the matrices that codes stand for, in the model's dtype."""
    inner, outer = spec.intermediate, spec.hidden
    shapes = {"gate_up": (1, inner, outer), "up": (1, inner, outer), "down": (1, outer, inner)}
    return {
        name: unpack_experts(
            codes, shapes[name], schemes.second if name == "down" else schemes.first
        ).to(spec.dtype)
        for name, codes in parts.items()
    }

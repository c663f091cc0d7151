"""Bring the experts of a loaded model to a device: into slots there, or all of them in codes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from moecc.checkpoint.without_experts import Absent
from moecc.codegen.emit import adder_of, choose_packed
from moecc.passes.activation import UnreadableActivation
from moecc.passes.options import Options
from moecc.records import note
from moecc.runtime.errors import OptionError, StrictError
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.device import new_device
from moecc.runtime.offload.device_link import DeviceLink, hold_in_memory
from moecc.runtime.offload.home import Home
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.policy import Policy
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.resident import Resident
from moecc.runtime.offload.stand_in import Lender
from moecc.runtime.ops import AddExpertsFn
from moecc.transformers_experts import experts_spec


def bring_to_device(
    model: nn.Module,
    absent: Sequence[Absent],
    lenders: Sequence[Lender],
    device: torch.device,
    options: Options,
    policy: Policy,
) -> list[Lender]:
    """Keep the experts of banks in host memory with slots on the device; move resident ones there.

    Kernels that do not read a scheme on the device are noted for the report. Raises `OptionError`
    for `misses="home"` on a CPU, `StrictError` for such kernels under `strict`.
    """
    other = new_device(device)
    if other is None:
        if options.misses == "home":
            raise OptionError("misses='home' is for models on a device; on the CPU leave it out")
        return list(lenders)
    for why in _fallbacks(absent, lenders, device, options):
        if options.strict:
            raise StrictError(f"strict=True and a scheme has no kernel on {device}: {why}")
        note(model, why)
    link = DeviceLink(other)
    moved: list[Lender] = []
    for one, lender in zip(absent, lenders, strict=True):
        if isinstance(lender, Resident):
            moved.append(lender.to(device))
            continue
        assert isinstance(lender, Bank)
        assert isinstance(lender.pool.link, Link)
        store = hold_in_memory(lender.store, lender.pool.link, other)
        pool = Pool(store.layout, lender.pool.slots, policy, link)
        home = Home(add=_host_kernel(one, lender)) if options.misses == "home" else None
        moved.append(replace(lender, store=store, pool=pool, home=home))
    return moved


def _host_kernel(absent: Absent, bank: Bank) -> AddExpertsFn:
    """Choose the kernel of a block for host memory, whatever computes it on the device."""
    try:
        return adder_of(experts_spec(absent.module, *absent.tensors), "auto", bank.schemes)
    except UnreadableActivation as error:
        raise OptionError(f"misses='home' cannot compute {absent.path!r}: {error}") from error


def _fallbacks(
    absent: Sequence[Absent], lenders: Sequence[Lender], device: torch.device, options: Options
) -> Iterator[str]:
    """Say which blocks the torch definition computes, for want of a kernel for their schemes."""
    for one, lender in zip(absent, lenders, strict=True):
        if lender.schemes is None:
            continue
        try:
            spec = experts_spec(one.module, *one.tensors)
        except UnreadableActivation:
            continue  # no kernel runs, which is an error where the block is called
        spec = replace(spec, device=device.type)
        for why in choose_packed(spec, lender.schemes, options.kernels)[1]:
            yield f"{one.path}: torch computes its {lender.schemes} experts: {why}"

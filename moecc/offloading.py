"""Move the experts of a model in memory to disk: `moecc.offload`."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moecc import backend, budgets, capture
from moecc.checkpoint.pack import Progress
from moecc.checkpoint.packed import PackedBlock, open_store
from moecc.checkpoint.recipes import lay_out, layout_of
from moecc.checkpoint.writing import write_records, write_whole
from moecc.find_experts import Experts, find_experts, run_blocks
from moecc.lenders import settle
from moecc.loading import make_banks
from moecc.module_recipes import MARK
from moecc.passes.options import Options
from moecc.placement import place_experts
from moecc.runtime.errors import InputError, ModelError, StoreError
from moecc.runtime.modules import parameters_of
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.stand_in import is_stand_in, refuse_to_save, stand_in
from moecc.runtime.offload.trace import Counts
from moecc.transformers_experts import adopted

_ADVICE = "the model is as it was; make room, or choose another store"


def offload(
    model: nn.Module,
    *inputs: Any,
    store: str | Path,
    progress: Progress | None = None,
    **options: Any,
) -> nn.Module:
    """Move the experts of a model in memory to files in the folder `store`; gives the same model.

    From then on they are read when a token needs them, through a cache of `expert_memory` bytes, as
    with `moecc.load`; with `quantize`, they are written in that scheme. `options` are those of
    `torch.compile(model, backend="moecc", options=...)`. Works for every block that moecc finds,
    in models of any origin. `inputs` are those of a call; without them, modules that may be blocks
    are tried on random ones, which finds those that take hidden states of shape [B, S, H] or
    [T, H] alone.

        model = moecc.offload(model, tokens, store="experts", expert_memory="25%")
        model.forward = torch.compile(model.forward, backend="moecc")

    Files of an earlier call are replaced. Memory is free once nobody else refers to the parameters;
    an error leaves the model as it was. Raises `OptionError` for bad options and for a budget below
    one token's demand, `ModelError` when no experts are found that are parameters on the CPU,
    `StoreError` when they cannot be written.
    """
    assert backend.moecc  # importing it installs the hooks
    if any(map(is_stand_in, model.parameters())):
        raise ModelError("experts of this model are on disk already")
    if model.training:
        raise ModelError("the model is in training mode; call eval() before moecc.offload")
    chosen = budgets.resolve(model, Options.parse(options))
    capture.adopt(model, replace(chosen, quantize=None))
    experts = find_experts(model, inputs, chosen.kernels)
    blocks = [_block(number, one, chosen) for number, one in enumerate(experts)]
    _check_budget(blocks, experts, chosen)
    folder = Path(store)
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(block.experts * block.layout.size for block in blocks)
    done = 0
    for block, one in zip(blocks, experts, strict=True):
        show = partial(_show, progress, done, total)
        write_whole(folder / block.file, partial(_write, one, block, show), _ADVICE)
        done += block.experts * block.layout.size
    stores = [open_store(folder, block) for block in blocks]
    schemes, active = [one.schemes for one in blocks], [one.active for one in experts]
    banks = make_banks(model, stores, schemes, chosen, active)
    settle(model, chosen)
    with _bound(model, experts, banks):
        capture.adopt(model, chosen)
        run_blocks(model, inputs, chosen.kernels)  # whoever reads a stand-in raises here, not later
    for bank in banks:
        bank.pool.trace.counts = Counts()
    return model


def _block(number: int, experts: Experts, options: Options) -> PackedBlock:
    if experts.spec.device != "cpu" or experts.spec.learned:
        what = "multiply by a vector of their own" if experts.spec.learned else "are not on the CPU"
        raise ModelError(f"the experts of {experts.path!r} {what}, and cannot be left on disk")
    schemes = options.schemes(experts.path)
    return PackedBlock(
        path=experts.path or "experts",
        file=f"offloaded-{number:05}.safetensors",
        layout=layout_of(experts.tensors, experts.spec, schemes),
        experts=experts.spec.experts,
        schemes=schemes,
    )


def _check_budget(
    blocks: Sequence[PackedBlock], experts: Sequence[Experts], options: Options
) -> None:
    """Raise `OptionError` before anything is written."""
    demands = [
        Demand(name=block.path, experts=block.experts, active=one.active, size=block.layout.size)
        for block, one in zip(blocks, experts, strict=True)
    ]
    memory = 1.0 if options.expert_memory is None else options.expert_memory
    place_experts(demands, memory, options.trace)


def _show(progress: Progress | None, before: int, total: int, count: int) -> None:
    if progress is not None:
        progress(before + count, total)


def _write(experts: Experts, block: PackedBlock, show: Callable[[int], None], part: Path) -> None:
    records = (_record(experts, block, number) for number in range(block.experts))
    write_records(block.path, records, block.experts, block.layout.size, show, part)


def _record(experts: Experts, block: PackedBlock, number: int) -> torch.Tensor:
    matrices = {name: one.detach()[number : number + 1] for name, one in experts.tensors.items()}
    try:
        return lay_out(matrices, block.layout, experts.spec, block.schemes)
    except InputError as error:
        raise StoreError(f"cannot write expert {number} of {block.path!r}: {error}") from error


@contextmanager
def _bound(model: nn.Module, experts: Sequence[Experts], banks: Sequence[Bank]) -> Generator[None]:
    """Put stand-ins in the place of experts, and the experts back if what follows fails."""
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    hooks: list[RemovableHandle] = []
    made: dict[int, nn.Parameter] = {}

    def replace_in(holder: dict[str, Any]) -> bool:
        count = len(before)
        for name, value in list(holder.items()):
            for one, bank in zip(experts, banks, strict=True):
                if isinstance(value, torch.Tensor) and one.holds(value):
                    before.append((holder, name, value))
                    holder[name] = made.setdefault(id(value), stand_in(value, bank))
        return len(before) > count

    for module in model.modules():
        if MARK in module.__dict__:
            replace_in(module.__dict__[MARK].__dict__)
        if replace_in(cast("dict[str, Any]", parameters_of(module))):
            hooks.append(module.register_state_dict_pre_hook(refuse_to_save))
            if module not in adopted:
                hooks.append(module.register_forward_pre_hook(_refuse_to_run))
    try:
        yield
    except BaseException:
        for holder, name, value in before:
            holder[name] = value
        for hook in hooks:
            hook.remove()
        raise


def _refuse_to_run(module: nn.Module, _: Any) -> None:
    """Raise where a block that is found in graphs runs without one, and would compute with NaN."""
    if not torch.compiler.is_compiling() and "forward" not in module.__dict__:
        raise InputError(
            f"the experts of {type(module).__name__} are on disk, where only the compiled model "
            "reads them: call torch.compile(model, backend='moecc')"
        )

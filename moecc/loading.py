"""Load a model whose experts do not fit in memory: `moecc.load`."""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecc.balancing import read_shares
from moecc.calibrate import calibrate as measure
from moecc.calibrate import check_calibrates
from moecc.checkpoint.calibration import Calibration
from moecc.checkpoint.direct import find_store
from moecc.checkpoint.fingerprint import fingerprint
from moecc.checkpoint.folders import find_folder
from moecc.checkpoint.pack import Progress, check_source, pack
from moecc.checkpoint.packed import FORMAT, is_packed, open_store, read_manifest
from moecc.checkpoint.recipes import Recipe, find_recipes, make_record
from moecc.checkpoint.weights import Weights, find_weights
from moecc.checkpoint.without_experts import Absent, load_model
from moecc.codegen.native.build import cache_folder
from moecc.lenders import settle
from moecc.links import new_link
from moecc.on_device import bring_to_device
from moecc.parallel import agree
from moecc.passes.options import Options
from moecc.passes.shard_experts import exchange_of
from moecc.placement import place_experts
from moecc.records import note
from moecc.runtime.errors import ModelError, OptionError, StoreError
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.guesses import Guesses
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.policy import AUTO, POLICIES, Policy
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.record import new_records
from moecc.runtime.offload.resident import Resident
from moecc.runtime.offload.stand_in import Lender, put_in
from moecc.runtime.offload.store import Store
from moecc.runtime.offload.trial import Trial
from moecc.runtime.schemes.scheme import Schemes
from moecc.settling import settle_budget

_log = logging.getLogger("moecc.load")


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    calibrate: Sequence[str | torch.Tensor] | None = None,
    compensate: bool = False,
    **options: Any,
) -> nn.Module:
    """Load a transformers model, its experts through a cache when `expert_memory` says so.

    `name` is a checkpoint folder in safetensors, a hub id, a GGUF file, or a folder that
    `moecc pack` wrote;
    `options` are those of `torch.compile(model, backend="moecc", options=...)`. Of checkpoints in
    MXFP4, FP8, GPTQ or AWQ experts keep their codes, without `quantize`; the rest is dequantized.

    With `expert_memory`, experts are read from disk when a token needs them, and no more than that
    many bytes of them are in memory, shared among blocks evenly, or as a `trace` of `moecc trace`
    says that they help most. With `quantize`, they are packed one by one, so that full
    experts are never all in memory; with both, into a packed store beside moecc's other caches,
    once. `progress` is called meanwhile with the bytes done and all of them. `calibrate` is a few
    prompts, texts or token ids [T], that the unquantized model is run on first, expert by expert:
    errors then weigh as much as inputs are large. With `compensate`, codes of int4, int3 and int2
    also make up for each other's errors: better, slower, and it takes E (H² + I²) floats a block.

    With `expert_parallel`, each rank reads its own share of every block's experts, and no more.

    On a CUDA `device` with `expert_memory`, experts are in pinned host memory, and come into slots
    there; with `quantize` alone, they are all there.

    The model computes with moecc's kernels at once; compile it for the rest:

        model = moecc.load("org/name", expert_memory="8GiB")
        model.forward = torch.compile(model.forward, backend="moecc")
        with torch.no_grad():  # kernels have no gradients
            model.generate(...)

    Raises `OptionError` for bad options and for a budget below one token's demand, `ModelError`
    when there is no such model, `StoreError` when its files are damaged.
    """
    chosen = Options.parse(options)
    agree(chosen)
    folder = find_folder(str(name))
    weights = find_weights(folder)  # names what is damaged, before transformers stumbles over it
    if is_packed(folder):
        if calibrate is not None:
            raise OptionError(f"{str(folder)!r} is packed; calibrate when a checkpoint is packed")
        model, absent, lenders = _load_packed(folder, weights, dtype, chosen)
    else:
        seen = None
        if calibrate is not None:
            check_calibrates(chosen.quantize)
            seen = measure(folder, calibrate, dtype, compensate=compensate)
        elif compensate:
            raise OptionError("compensate needs prompts: give calibrate= too")
        model, absent, lenders = _load_checkpoint(folder, weights, dtype, chosen, progress, seen)
    model.to(device)
    at = torch.device(device)
    lenders = bring_to_device(model, absent, lenders, at, chosen, _policy(chosen))
    for one, lender in zip(absent, lenders, strict=True):
        put_in(one.module, list(one.names), list(one.tensors), lender, device)
        if (exchange := exchange_of(chosen)) is not None:
            exchange.share(one.module.get_parameter(one.names[0]), len(one.tensors[0]))
    from moecc import backend, capture

    assert backend.moecc  # importing it installs the hooks
    if chosen.budget is not None:
        chosen = replace(chosen, quantize=None)  # lenders know the schemes that it became
    settle(model, chosen)
    capture.adopt(model, chosen)
    return model.eval()


def _policy(options: Options) -> Policy:
    return POLICIES[AUTO if options.policy == "auto" else options.policy]


_Loaded = tuple[nn.Module, Sequence[Absent], Sequence[Lender]]


def _load_packed(
    folder: Path, weights: Weights, dtype: torch.dtype | str, options: Options
) -> _Loaded:
    """Load what `moecc pack` wrote."""
    manifest = read_manifest(folder)
    check_source(manifest)
    if options.budget is not None:
        raise OptionError(f"{str(folder)!r} is packed, its bits are shared out; leave quantize out")
    for block in manifest.blocks:
        wanted = options.schemes(block.path) if options.quantize is not None else block.schemes
        if wanted != block.schemes:
            raise OptionError(
                f"{str(folder)!r} is packed as {block.schemes or manifest.dtype}, not as {wanted}; "
                "leave quantize out, or pack the model again"
            )
    wanted = getattr(torch, manifest.dtype)
    if dtype not in ("auto", manifest.dtype, wanted):
        raise OptionError(f"{str(folder)!r} is packed for {wanted}, not for {dtype}")
    model, absent = load_model(folder, wanted, weights=weights)
    blocks = {block.path: block for block in manifest.blocks}
    if blocks.keys() != {one.path for one in absent}:
        raise ModelError(f"{str(folder)!r} has experts of {sorted(blocks)}, which is not its model")
    if manifest.calibration:
        note(model, manifest.calibration)
    if manifest.source.endswith(".gguf"):
        note(model, "gguf weights outside of experts were dequantized when they were packed")
    stores = [open_store(folder, blocks[one.path]) for one in absent]
    schemes = [blocks[one.path].schemes for one in absent]
    return model, absent, make_banks(model, stores, schemes, options)


def _load_checkpoint(
    folder: Path,
    weights: Weights,
    dtype: torch.dtype | str,
    options: Options,
    progress: Progress | None,
    calibration: Calibration | None,
) -> _Loaded:
    """Load a checkpoint as it came."""
    exchange = exchange_of(options)
    kept = options.expert_memory is None and options.quantize is None and not weights.coded
    whole = kept and exchange is None
    model, absent = load_model(folder, dtype, weights=weights, with_experts=whole)
    if whole:
        return model, (), ()
    if not absent:
        raise ModelError(f"{str(folder)!r} has no experts that moecc can read one by one")
    if options.expert_memory is None:
        options = settle_budget(folder, dtype, options)
        recipes = find_recipes(model, absent, weights, options, calibration=calibration)
        if calibration is not None:
            note(model, str(calibration))
        if exchange is not None:
            return model, absent, read_shares(absent, recipes, exchange, progress)
        return model, absent, _packed_in_memory(recipes, progress)
    if options.quantize is None:
        recipes = find_recipes(model, absent, weights, options)
        direct = [one for one in map(find_store, recipes) if one is not None]
        if len(direct) == len(recipes):
            return model, absent, make_banks(model, direct, [None] * len(direct), options)
    dtype = absent[0].tensors[0].dtype
    target = _own_store(folder, weights, options, dtype, calibration)
    _drop_damaged(target)
    if not is_packed(target):
        _log.info("packing %s into %s", folder, target)
        pack(folder, target, options.quantize, dtype, progress, calibration=calibration)
    made = replace(options, quantize=None)  # the store says what it has
    return _load_packed(target, find_weights(target), "auto", made)


def _packed_in_memory(recipes: Sequence[Recipe], progress: Progress | None) -> list[Resident]:
    total = sum(recipe.experts * recipe.layout.size for recipe in recipes)
    done = 0
    lenders: list[Resident] = []
    for recipe in recipes:
        _, records = new_records(recipe.experts, recipe.layout)
        for expert in range(recipe.experts):
            records[expert] = make_record(recipe, expert)
            done += recipe.layout.size
            if progress is not None:
                progress(done, total)
        tensors = recipe.layout.tensors(records)
        lenders.append(Resident.of(tensors, range(len(records)), len(records), recipe.schemes))
    return lenders


def make_banks(
    model: nn.Module,
    stores: Sequence[Store],
    schemes: Sequence[Schemes | None],
    options: Options,
    active: Sequence[int] = (),
) -> list[Bank]:
    """Give every block its share of the budget, and a bank.

    `active` has each block's K, by default the configuration's. Raises `OptionError` when the
    budget is below one token's demand.
    """
    memory = 1.0 if options.expert_memory is None else options.expert_memory
    policy = _policy(options)
    link, trial = new_link(), Trial()
    slots = place_experts(demands_of(model, stores, active), memory, options.trace)
    return [
        Bank(
            number=number,
            store=store,
            pool=Pool(store.layout, slots[number], policy, link),
            schemes=schemes[number],
            guesses=Guesses(trial=trial),
        )
        for number, store in enumerate(stores)
    ]


def demands_of(
    model: nn.Module, stores: Sequence[Store], active: Sequence[int] = ()
) -> list[Demand]:
    """Say what each block would like to keep in memory; `active` as in `make_banks`."""
    return [
        Demand(name=store.name, experts=store.experts, active=one, size=store.layout.size)
        for store, one in zip(stores, active or [active_of(model)] * len(stores), strict=True)
    ]


_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
"""What configurations call K; used to refuse a budget early, and for nothing else."""


def active_of(model: nn.Module) -> int:
    """Read K from a model's configuration; 1 where it does not say."""
    config: Any = getattr(model, "config", None)
    for one in (config, getattr(config, "text_config", None)):
        for name in _TOP_K:
            value = getattr(one, name, None)
            if isinstance(value, int):
                return value
    return 1


def _drop_damaged(folder: Path) -> None:
    """Delete a packed store of our own that cannot be read; it can be made again."""
    try:
        if is_packed(folder):
            read_manifest(folder)
    except StoreError as error:
        _log.warning("%s; packing it anew", error)
        shutil.rmtree(folder)


def _own_store(
    folder: Path,
    weights: Weights,
    options: Options,
    dtype: torch.dtype,
    calibration: Calibration | None,
) -> Path:
    """Say where the packed copy of a checkpoint goes."""
    files = "".join(map(fingerprint, weights.files))
    what = f"{FORMAT} {folder.resolve()} {files} {options.quantize} {dtype} {calibration}"
    digest = hashlib.sha256(what.encode()).hexdigest()
    return cache_folder() / "packed" / digest[:24]

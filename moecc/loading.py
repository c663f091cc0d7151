"""Load a model whose experts do not fit in memory: `moecc.load`."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecc.checkpoint.files import read_headers, shards
from moecc.checkpoint.pieces import Piece
from moecc.checkpoint.sources import find_parameters
from moecc.checkpoint.without_experts import Absent, load_without_experts
from moecc.passes.options import Options
from moecc.runtime.errors import ModelError, StoreError
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.plan import Demand, share_slots
from moecc.runtime.offload.policy import POLICIES
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.record import Layout
from moecc.runtime.offload.stand_in import put_in
from moecc.runtime.offload.store import Read, Store


def load(name: str | Path, *, dtype: torch.dtype | str = "auto", **options: Any) -> nn.Module:
    """Load a transformers model, its experts through a cache when `expert_memory` says so.

    `name` is a checkpoint folder in safetensors, or a hub id; `options` are those of
    `torch.compile(model, backend="moecc", options=...)`. With `expert_memory`, experts are read
    from the checkpoint's own files when a token needs them, and no more than that many bytes of
    them are in memory. The model computes with moecc's kernels at once; compile it for the rest:

        model = moecc.load("org/name", expert_memory="8GiB")
        model.forward = torch.compile(model.forward, backend="moecc")
        with torch.no_grad():  # kernels have no gradients
            model.generate(...)

    Raises `OptionError` for bad options and for a budget below one token's demand, `ModelError`
    when there is no such model, `StoreError` when its files are damaged.
    """
    chosen = Options.parse(options)
    folder = _folder(str(name))
    read_headers(shards(folder))  # names what is damaged, before transformers stumbles over it
    model, absent = load_without_experts(folder, dtype)
    if not absent:
        raise ModelError(f"{str(name)!r} has no experts that moecc can leave on disk")
    stores = find_stores(model, absent, folder)
    for one, bank in zip(absent, _banks(model, stores, chosen), strict=True):
        put_in(one.module, list(one.names), list(one.tensors), bank)
    from moecc import backend, capture

    assert backend.moecc  # importing it installs the hooks
    capture.adopt(model, chosen)
    return model.eval()


def find_stores(model: nn.Module, absent: Sequence[Absent], folder: Path) -> list[Store]:
    """Say where the experts of every block are in the checkpoint's own files.

    Raises `StoreError` for a checkpoint that would have to be converted first.
    """
    wanted = {
        name: tensor.shape
        for one in absent
        for name, tensor in zip(one.parameters, one.tensors, strict=True)
    }
    pieces = find_parameters(model, wanted, shards(folder))
    return [_store(one, [pieces[name] for name in one.parameters]) for one in absent]


def _store(absent: Absent, pieces: Sequence[Piece]) -> Store:
    first, second = absent.tensors
    layout = Layout.of(
        {
            "gate_up": (tuple(first.shape[1:]), first.dtype),
            "down": (tuple(second.shape[1:]), second.dtype),
        }
    )
    reads = tuple(
        tuple(
            read
            for part, piece, name in zip(layout.parts, pieces, absent.parameters, strict=True)
            for read in _reads(piece.select(expert), part.offset, part.dtype, name)
        )
        for expert in range(first.shape[0])
    )
    return Store(name=absent.path, layout=layout, reads=reads)


def _reads(piece: Piece, into: int, dtype: torch.dtype, name: str) -> list[Read]:
    tensors = piece.copies()
    if tensors is None or piece.dtype != dtype:
        raise StoreError(
            f"parameter {name!r} is not stored as the model reads it ({piece.kind} of "
            f"{piece.dtype}, not a copy of {dtype}), so its experts cannot be read from there; "
            "convert it once with moecc pack"
        )
    reads: list[Read] = []
    for tensor in tensors:
        reads.append(Read(file=tensor.file, offset=tensor.offset, length=tensor.size, into=into))
        into += tensor.size
    return reads


def _banks(model: nn.Module, stores: Sequence[Store], options: Options) -> list[Bank]:
    active = _active(model)
    demands = [
        Demand(name=store.name, experts=store.experts, active=active, size=store.layout.size)
        for store in stores
    ]
    memory = 1.0 if options.expert_memory is None else options.expert_memory
    policy = POLICIES["lru" if options.policy == "auto" else options.policy]
    link = Link()
    return [
        Bank(number=number, store=store, pool=Pool(store.layout, slots, policy, link))
        for number, (store, slots) in enumerate(
            zip(stores, share_slots(demands, memory), strict=True)
        )
    ]


_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
"""What configurations call K; used to refuse a budget early, and for nothing else."""


def _active(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    for one in (config, getattr(config, "text_config", None)):
        for name in _TOP_K:
            value = getattr(one, name, None)
            if isinstance(value, int):
                return value
    return 1


def _folder(name: str) -> Path:
    """Find a checkpoint folder, from the hub if it is not one here."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ModelError(f"there is no checkpoint folder {name!r}, and it is no hub id")
    hub: Any = importlib.import_module("huggingface_hub")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's own errors, network errors
        raise ModelError(f"cannot download {name!r}: {type(error).__name__}: {error}") from error

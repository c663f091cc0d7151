"""Find the experts of a transformers model in its checkpoint.

transformers describes how checkpoint tensors become parameters: names are changed by patterns, and
converters stack or concatenate what several names hold. Both are run here on descriptions of
tensors (`moecc.checkpoint.pieces`) instead of tensors. No model is named anywhere.
"""

import copy
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moecc.checkpoint.files import Tensor
from moecc.checkpoint.pieces import Piece, as_piece
from moecc.runtime.errors import StoreError


def find_parameters(
    model: nn.Module, wanted: Mapping[str, torch.Size], pieces: Mapping[str, Piece]
) -> dict[str, Piece]:
    """Say how each wanted parameter is made of the `pieces` of a checkpoint.

    `wanted` has the names and shapes of parameters that `model` lacks at the moment; `model` is a
    transformers model. Raises `StoreError` naming a parameter that is not there, has another shape
    or is made in a way that cannot be followed.
    """
    loading: Any = importlib.import_module("transformers.core_model_loading")
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    transforms: list[Any] = mapping.get_model_conversion_mapping(model) or []
    renamings = [one for one in transforms if isinstance(one, loading.WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, loading.WeightConverter)]
    names: dict[str, Any] = {**model.state_dict(), **wanted}
    prefix = getattr(model, "base_model_prefix", "")
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    collected: dict[str, Any] = {}
    found: dict[str, Piece] = {}
    for name in sorted(pieces, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, names)
        if target not in wanted:
            continue
        piece = pieces[name]
        if pattern is None:
            found[target] = piece
            continue
        converter = collected.setdefault(target, copy.deepcopy(by_pattern[pattern]))
        converter.add_tensor(target, name, pattern, piece)
    for target, converter in collected.items():
        found.update(_converted(target, converter, model))
    for name, shape in wanted.items():
        _check(name, shape, found.get(name))
    return {name: found[name] for name in wanted}


def _converted(target: str, converter: Any, model: Any) -> dict[str, Piece]:
    """Run a converter's operations on pieces."""
    pieces: dict[str, Any] = converter.materialize_tensors()
    try:
        for operation in converter.operations:
            pieces = operation.convert(
                pieces,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=target,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        (piece,) = pieces.values()
        return {target: as_piece(piece)}
    except (StoreError, ValueError, TypeError, AttributeError) as error:
        operations = [type(one).__name__ for one in converter.operations]
        raise StoreError(
            f"cannot follow how {target!r} is made of its checkpoint by {operations}: {error}; "
            "load the model with transformers, save it again, and load that"
        ) from error


def _check(name: str, shape: torch.Size, piece: Piece | None) -> None:
    if piece is None:
        raise StoreError(f"the checkpoint has nothing for parameter {name!r}")
    if piece.shape != shape:
        raise StoreError(
            f"parameter {name!r} is {[*shape]}, and the checkpoint's is {[*piece.shape]}"
        )


def read_tensor(tensor: Tensor) -> torch.Tensor:
    """Read one tensor of a file into memory of its own.

    Raises `StoreError` when the file ends before it.
    """
    with tensor.file.open("rb") as opened:
        opened.seek(tensor.offset)
        data = bytearray(opened.read(tensor.size))
    if len(data) < tensor.size:
        raise StoreError(f"{str(tensor.file)!r} ends before byte {tensor.offset + tensor.size:,}")
    if not data:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)

"""Make the record of one expert out of a checkpoint, in the model's layout or in a scheme."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moecc.checkpoint.files import shards
from moecc.checkpoint.pieces import Piece
from moecc.checkpoint.sources import find_parameters, read_tensor
from moecc.checkpoint.without_experts import Absent
from moecc.codegen.low_bit import packed_tensors
from moecc.codegen.spec import KernelSpec
from moecc.passes.activation import UnreadableActivation
from moecc.passes.options import Options
from moecc.runtime.errors import InputError, ModelError, MoeccError, OptionError, StoreError
from moecc.runtime.offload.record import Layout
from moecc.runtime.schemes.packing import packed_bytes
from moecc.runtime.schemes.scheme import Schemes
from moecc.transformers_experts import experts_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the records of one block are made."""

    path: str
    """Of the module."""
    experts: int
    layout: Layout
    pieces: tuple[Piece, Piece]
    """The first product's weights and the second's, as the checkpoint has them."""
    dtype: torch.dtype
    """Of the model."""
    schemes: Schemes | None
    spec: KernelSpec | None
    """Of the block's kernel; None without schemes."""


def find_recipes(
    model: nn.Module, absent: Sequence[Absent], folder: Path, options: Options
) -> list[Recipe]:
    """Say how the experts that a model lacks are made of the checkpoint in `folder`.

    Their schemes are what `options.quantize` says. Raises `StoreError` for a checkpoint that does
    not have them, `ModelError` when a block with schemes has an activation that cannot be read.
    """
    if options.budget is not None:
        raise OptionError(f"quantize={options.quantize!r} needs a model in memory; name schemes")
    wanted = {
        name: tensor.shape
        for one in absent
        for name, tensor in zip(one.parameters, one.tensors, strict=True)
    }
    found = find_parameters(model, wanted, shards(folder))
    return [
        _recipe(
            one, (found[one.parameters[0]], found[one.parameters[1]]), options.schemes(one.path)
        )
        for one in absent
    ]


def _recipe(absent: Absent, pieces: tuple[Piece, Piece], schemes: Schemes | None) -> Recipe:
    layout, spec = layout_of(absent, schemes)
    return Recipe(
        path=absent.path,
        experts=len(absent.tensors[0]),
        layout=layout,
        pieces=pieces,
        dtype=absent.tensors[0].dtype,
        schemes=schemes,
        spec=spec,
    )


def layout_of(absent: Absent, schemes: Schemes | None) -> tuple[Layout, KernelSpec | None]:
    """Lay out the records of a block, and give its kernel's spec where they are in schemes.

    Raises `ModelError` when there are schemes and the activation cannot be read.
    """
    first, second = absent.tensors
    spec = None
    matrices = {
        "gate_up": (tuple(first.shape[1:]), first.dtype),
        "down": (tuple(second.shape[1:]), second.dtype),
    }
    if schemes is not None:
        try:
            spec = experts_spec(absent.module, first, second)
        except UnreadableActivation as error:
            raise ModelError(f"{absent.path!r} cannot be quantized: {error}") from error
        matrices = _packed_matrices(spec, schemes)
    return Layout.of(matrices), spec


def _packed_matrices(
    spec: KernelSpec, schemes: Schemes
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    inner, outer = spec.intermediate, spec.hidden
    matrices = {
        "gate_up": packed_bytes(inner, outer, schemes.first),
        "down": packed_bytes(outer, inner, schemes.second),
    }
    if spec.gated:
        matrices["up"] = matrices["gate_up"]
    return {name: ((size,), torch.uint8) for name, size in matrices.items()}


def make_record(recipe: Recipe, expert: int) -> torch.Tensor:
    """Read one expert and lay it out: uint8 [record].

    Raises `StoreError` naming block and expert when its weights cannot be packed.
    """
    try:
        matrices = [piece.select(expert).read(read_tensor) for piece in recipe.pieces]
        if not all(matrix.isfinite().all() for matrix in matrices):
            raise InputError("its weights hold inf or NaN")
        first, second = (matrix.to(recipe.dtype).unsqueeze(0) for matrix in matrices)
        tensors: dict[str, torch.Tensor | None] = {"gate_up": first, "down": second}
        if recipe.schemes is not None and recipe.spec is not None:
            packed = packed_tensors(
                recipe.spec, recipe.schemes, (first, second, None, None, None, None)
            )
            tensors = {"gate_up": packed[0], "down": packed[1], "up": packed[4]}
    except MoeccError as error:
        raise StoreError(f"cannot pack expert {expert} of {recipe.path!r}: {error}") from error
    record = torch.zeros(recipe.layout.size, dtype=torch.uint8)
    for part in recipe.layout.parts:
        tensor = tensors[part.name]
        assert tensor is not None
        data = tensor.contiguous().view(torch.uint8).flatten()
        record[part.offset : part.offset + part.size] = data
    return record

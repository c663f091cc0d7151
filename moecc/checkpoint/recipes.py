"""Make the record of one expert out of a checkpoint, in the model's layout or in a scheme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from moecc.checkpoint.calibration import Calibration, Importance
from moecc.checkpoint.kept import kept_schemes, packed_codes
from moecc.checkpoint.pieces import Piece
from moecc.checkpoint.sources import find_parameters, read_tensor
from moecc.checkpoint.weights import Weights
from moecc.checkpoint.without_experts import Absent
from moecc.codegen.low_bit import packed_tensors
from moecc.codegen.spec import KernelSpec
from moecc.passes.activation import UnreadableActivation
from moecc.passes.options import Options
from moecc.runtime.errors import InputError, ModelError, MoeccError, StoreError
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
    kept: bool = False
    """The schemes are those of the checkpoint, whose codes are packed as they are."""
    importance: Importance | None = None
    """What errors of columns weigh when they are rounded."""


def find_recipes(
    model: nn.Module,
    absent: Sequence[Absent],
    weights: Weights,
    options: Options,
    *,
    calibration: Calibration | None = None,
    keep_codes: bool = True,
) -> list[Recipe]:
    """Say how the experts that a model lacks are made of a checkpoint.

    Their schemes are what `options.quantize` says, else those that hold the checkpoint's own codes,
    if it has any and `keep_codes`. Raises `StoreError` for a checkpoint that does not have them,
    `ModelError` when a block with schemes has an activation that cannot be read.
    """
    weights.check_method()
    wanted = {
        name: tensor.shape
        for one in absent
        for name, tensor in zip(one.parameters, one.tensors, strict=True)
    }
    found = find_parameters(model, wanted, weights.pieces)
    recipes: list[Recipe] = []
    for one in absent:
        pieces = found[one.parameters[0]], found[one.parameters[1]]
        kept = keep_codes and options.quantize is None
        schemes = kept_schemes(one.path, pieces) if kept else options.schemes(one.path)
        recipe = _recipe(one, pieces, schemes)
        importance = None if calibration is None else calibration.blocks[one.path]
        recipes.append(replace(recipe, kept=kept, importance=importance))
    return recipes


def _recipe(absent: Absent, pieces: tuple[Piece, Piece], schemes: Schemes | None) -> Recipe:
    layout, spec = layout_of_absent(absent, schemes)
    return Recipe(
        path=absent.path,
        experts=len(absent.tensors[0]),
        layout=layout,
        pieces=pieces,
        dtype=absent.tensors[0].dtype,
        schemes=schemes,
        spec=spec,
    )


def layout_of_absent(absent: Absent, schemes: Schemes | None) -> tuple[Layout, KernelSpec | None]:
    """Lay out the records of a block, and give its kernel's spec where they are in schemes.

    Raises `ModelError` when there are schemes and the activation cannot be read.
    """
    first, second = absent.tensors
    spec = None
    if schemes is not None:
        try:
            spec = experts_spec(absent.module, first, second)
        except UnreadableActivation as error:
            raise ModelError(f"{absent.path!r} cannot be quantized: {error}") from error
    return layout_of({"gate_up": first, "down": second}, spec, schemes), spec


def layout_of(
    tensors: Mapping[str, torch.Tensor], spec: KernelSpec | None, schemes: Schemes | None
) -> Layout:
    """Lay out the record of an expert: matrices [E, ., .] as they are, or what they are packed to.

    `spec` is that of the block's kernel, for schemes.
    """
    if schemes is None or spec is None:
        plain = {name: (tuple(one.shape[1:]), one.dtype) for name, one in tensors.items()}
        return Layout.of(plain)
    inner, outer = spec.intermediate, spec.hidden
    sizes = {
        "gate_up": packed_bytes(inner, outer, schemes.first),
        "down": packed_bytes(outer, inner, schemes.second),
    }
    if spec.gated:
        sizes["up"] = sizes["gate_up"]
    return Layout.of({name: ((size,), torch.uint8) for name, size in sizes.items()})


def make_record(recipe: Recipe, expert: int) -> torch.Tensor:
    """Read one expert and lay it out: uint8 [record].

    Raises `StoreError` naming block and expert when its weights cannot be packed.
    """
    try:
        return _record(recipe, expert)
    except MoeccError as error:
        raise StoreError(f"cannot pack expert {expert} of {recipe.path!r}: {error}") from error


def lay_out(
    tensors: Mapping[str, torch.Tensor],
    layout: Layout,
    spec: KernelSpec | None,
    schemes: Schemes | None,
    importance: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Make the record of one expert, uint8 [size], of its matrices [1, ., .].

    `importance` is that of `packed_tensors`. Raises `InputError` when they cannot be packed.
    """
    for name, matrix in tensors.items():
        if not matrix.isfinite().all():
            raise InputError(f"its {name} weights hold inf or NaN")
    parts: Mapping[str, torch.Tensor | None] = tensors
    if schemes is not None and spec is not None:
        given = (tensors["gate_up"], tensors["down"], None, None, tensors.get("up"), None)
        packed = packed_tensors(spec, schemes, given, importance)
        parts = {"gate_up": packed[0], "down": packed[1], "up": packed[4]}
    return _joined(parts, layout)


def _joined(parts: Mapping[str, torch.Tensor | None], layout: Layout) -> torch.Tensor:
    record = torch.zeros(layout.size, dtype=torch.uint8)
    for part in layout.parts:
        tensor = parts[part.name]
        assert tensor is not None
        data = tensor.contiguous().view(torch.uint8).flatten()
        record[part.offset : part.offset + part.size] = data
    return record


def _record(recipe: Recipe, expert: int) -> torch.Tensor:
    first, second = (piece.select(expert) for piece in recipe.pieces)
    if recipe.kept and recipe.schemes is not None and recipe.spec is not None:
        return _joined(packed_codes(recipe.spec, recipe.schemes, (first, second)), recipe.layout)
    matrices = [piece.read(read_tensor) for piece in (first, second)]
    for name, matrix in zip(("first", "second"), matrices, strict=True):
        if not matrix.is_floating_point():
            raise InputError(f"the weights of its {name} product are {matrix.dtype}, not floats")
    gate_up, down = (matrix.to(recipe.dtype).unsqueeze(0) for matrix in matrices)
    tensors = {"gate_up": gate_up, "down": down}
    importance = None if recipe.importance is None else recipe.importance.of(expert)
    return lay_out(tensors, recipe.layout, recipe.spec, recipe.schemes, importance)

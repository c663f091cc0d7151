"""Read experts straight from a checkpoint, where its files have them as the model does."""

from collections.abc import Sequence

import torch

from moecc.checkpoint.pieces import Piece
from moecc.checkpoint.recipes import Recipe
from moecc.runtime.offload.store import Read, Store


def find_store(recipe: Recipe) -> Store | None:
    """Say where the bytes of a block's records are; None if they have to be computed first."""
    if recipe.schemes is not None:
        return None
    reads = [_expert(recipe, expert) for expert in range(recipe.experts)]
    found = [one for one in reads if one is not None]
    if len(found) < len(reads):
        return None
    return Store(name=recipe.path, layout=recipe.layout, reads=tuple(found))


def _expert(recipe: Recipe, expert: int) -> tuple[Read, ...] | None:
    reads: list[Read] = []
    for part, piece in zip(recipe.layout.parts, recipe.pieces, strict=True):
        copied = _reads(piece.select(expert), part.offset, recipe.dtype)
        if copied is None:
            return None
        reads += copied
    return tuple(reads)


def _reads(piece: Piece, into: int, dtype: torch.dtype) -> Sequence[Read] | None:
    tensors = piece.copies()
    if tensors is None or piece.dtype != dtype:
        return None
    reads: list[Read] = []
    for tensor in tensors:
        reads.append(Read(file=tensor.file, offset=tensor.offset, length=tensor.size, into=into))
        into += tensor.size
    return reads

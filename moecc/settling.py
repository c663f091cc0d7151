"""Share the bits of `quantize="4.5bpw"` among the projections of a checkpoint."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from moecc.budgets import Matrices, choose
from moecc.checkpoint.pieces import Piece
from moecc.checkpoint.sources import read_tensor
from moecc.one_by_one import OneByOne, load_one_by_one
from moecc.passes.options import Options
from moecc.sensitivity import measure_sensitivity


def settle_budget(folder: Path, dtype: torch.dtype | str, options: Options) -> Options:
    """Replace a number of bits a weight by schemes, as `budgets.resolve` does in memory.

    The model is run with one expert in memory at a time. Raises `OptionError` when the smallest
    schemes take more bits, and what loading raises.
    """
    if options.budget is None:
        return options
    loaded = load_one_by_one(folder, dtype)
    blocks = {one.path: one.module for one in loaded.absent}
    sensitivity = measure_sensitivity(loaded.model, blocks)
    return replace(options, quantize=choose(dict(_matrices(loaded)), options.budget, sensitivity))


def _matrices(loaded: OneByOne) -> Iterator[tuple[str, Matrices]]:
    """Give the matrices of a checkpoint's experts, output-major."""
    for one, recipe in zip(loaded.absent, loaded.recipes, strict=True):
        turned = bool(getattr(one.module, "is_transposed", False))
        for tensor, piece, projection in zip(
            one.tensors, recipe.pieces, ("gate_up_proj", "down_proj"), strict=True
        ):
            experts, rows, columns = tensor.mT.shape if turned else tensor.shape
            read = partial(_read_matrix, piece, turned)
            shape = (experts, rows, columns)
            yield f"{one.path}.{projection}", Matrices(shape=shape, read=read)


def _read_matrix(piece: Piece, turned: bool, expert: int) -> torch.Tensor:
    matrix = piece.select(expert).read(read_tensor)
    return matrix.T if turned else matrix

"""Turn `quantize="4.5bpw"` into a scheme for each projection of a model.

Which block deserves the bits is a question about all of them, and a graph shows one, without its
weights. So the choice is made where the whole model is at hand: when it is given to torch.compile,
or when `moecc.load` or `moecc pack` has looked through its checkpoint.
What the backend is given then is a mapping, as a user could have written it, and reports show it.

An error weighs as much as it reaches: that of a block (`moecc.sensitivity`) times that of a
projection within its block. All experts of a block get the same scheme, since one call of a kernel
reads all of them, and a few of them tell how well a scheme fits.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moecc.passes.options import Options
from moecc.runtime.errors import InputError, OptionError
from moecc.runtime.modules import named_modules
from moecc.runtime.schemes.budget import CANDIDATES, allocate, relative_error
from moecc.runtime.schemes.packing import packed_bytes
from moecc.sensitivity import measure_sensitivity

_SAMPLE = 4
"""Experts of a matrix whose errors stand for all."""
_REACH = {"gate_up_proj": 0.5, "down_proj": 1.0}
"""What a relative error changes in a block's output: much of gate's and up's is where gates are
shut (0.1 to 0.8 of what down's changes, by block of the shipped model; docs/decisions/0022)."""
_chosen: "weakref.WeakKeyDictionary[nn.Module, dict[float, dict[str, str]]]" = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """The matrices of a projection, [E, N, K]."""

    shape: tuple[int, int, int]
    read: Callable[[int], torch.Tensor]
    """Gives one expert's, [N, K]."""


def resolve(model: nn.Module, options: Options) -> Options:
    """Replace a number of bits a weight by schemes; other options stay as they are.

    A model keeps its choice for as long as it lives, and is run on made-up tokens for it. Raises
    `OptionError` when it has no fused experts with weights, cannot be run so, or the smallest
    schemes take more.
    """
    bits = options.budget
    if bits is None:
        return options
    known = _chosen.setdefault(model, {})
    if bits not in known:
        matrices = dict(_matrices(model))
        paths = dict.fromkeys(name.rpartition(".")[0] for name in matrices)
        blocks = {path: model.get_submodule(path) for path in paths}
        known[bits] = choose(matrices, bits, measure_sensitivity(model, blocks) if blocks else {})
    return replace(options, quantize=known[bits])


def choose(
    matrices: Mapping[str, Matrices], bits: float, sensitivity: Mapping[str, float]
) -> dict[str, str]:
    """Give each projection, by its path, the name of a scheme; a few experts are read, one by one.

    `sensitivity` is what a relative squared error of a block weighs, by the block's path.
    Raises `OptionError` without matrices, or when the smallest schemes take more bits a weight.
    """
    if not matrices:
        raise OptionError(
            f"quantize='{bits:g}bpw' found no fused expert weights in this model to choose for; "
            "give a mapping such as {'*.down_proj': 'int8', '*': 'int4'}"
        )
    reach = reach_of(matrices, sensitivity)
    counts = [math.prod(one.shape) for one in matrices.values()]
    errors: list[list[float]] = []
    sizes: list[list[int]] = []
    for path, one in matrices.items():
        (experts, rows, columns), some = one.shape, _some(one)
        errors.append([relative_error(some, scheme) * reach[path] for scheme in CANDIDATES])
        sizes.append([experts * packed_bytes(rows, columns, scheme) for scheme in CANDIDATES])
    try:
        chosen = allocate(errors, sizes, int(bits * sum(counts) / 8))
    except InputError as error:
        raise OptionError(f"quantize='{bits:g}bpw' is too small: {error}") from None
    return {path: str(CANDIDATES[one]) for path, one in zip(matrices, chosen, strict=True)}


def reach_of(paths: Iterable[str], sensitivity: Mapping[str, float]) -> dict[str, float]:
    """Give what relative errors of projections weigh, by path, from what blocks do."""
    return {
        path: sensitivity[block] * _REACH[projection]
        for path in paths
        for block, _, projection in [path.rpartition(".")]
    }


def _some(matrices: Matrices) -> list[torch.Tensor]:
    experts = matrices.shape[0]
    step = max(1, experts // _SAMPLE)
    return [matrices.read(expert) for expert in range(0, experts, step)][:_SAMPLE]


def _matrices(model: nn.Module) -> Iterator[tuple[str, Matrices]]:
    """Give the expert matrices of transformers' fused experts, output-major."""
    for path, module in named_modules(model):
        experts: Any = module
        if not (hasattr(experts, "down_proj") and hasattr(experts, "is_transposed")):
            continue
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        for name, projection in ((first, "gate_up_proj"), ("down_proj", "down_proj")):
            weights: torch.Tensor = getattr(experts, name).detach()
            if weights.is_meta:
                raise OptionError(f"{path}.{name} holds no data to choose by; load it first")
            weights = weights.mT if experts.is_transposed else weights
            experts_, rows, columns = weights.shape
            found = Matrices(shape=(experts_, rows, columns), read=weights.__getitem__)
            yield f"{path}.{projection}", found

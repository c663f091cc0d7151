"""Turn `quantize="4.5bpw"` into a scheme for each projection of a model.

Which block deserves the bits is a question about all of them, and a graph shows one, without its
weights. So the choice is made where the whole model is at hand: when it is given to torch.compile,
or when `moecc.load` or `moecc pack` has looked through its checkpoint.
What the backend is given then is a mapping, as a user could have written it, and reports show it.

Errors are those of a few experts of each matrix, and all experts of a block get the same scheme:
one call of a kernel reads all of them.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moecc.passes.options import Options
from moecc.runtime.errors import InputError, OptionError
from moecc.runtime.modules import named_modules
from moecc.runtime.schemes.budget import CANDIDATES, allocate, relative_error
from moecc.runtime.schemes.packing import packed_bytes

_SAMPLE = 4
"""Experts of a matrix whose errors stand for all."""
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

    A model keeps its choice for as long as it lives. Raises `OptionError` when it has no fused
    experts with weights, or the smallest schemes take more.
    """
    bits = options.budget
    if bits is None:
        return options
    known = _chosen.setdefault(model, {})
    if bits not in known:
        known[bits] = choose(dict(_matrices(model)), bits)
    return replace(options, quantize=known[bits])


def choose(matrices: Mapping[str, Matrices], bits: float) -> dict[str, str]:
    """Give each projection, by its path, the name of a scheme; a few experts are read, one by one.

    Raises `OptionError` without matrices, or when the smallest schemes take more bits a weight.
    """
    if not matrices:
        raise OptionError(
            f"quantize='{bits:g}bpw' found no fused expert weights in this model to choose for; "
            "give a mapping such as {'*.down_proj': 'int8', '*': 'int4'}"
        )
    counts = [math.prod(one.shape) for one in matrices.values()]
    errors: list[list[float]] = []
    sizes: list[list[int]] = []
    for (experts, rows, columns), some in ((one.shape, _some(one)) for one in matrices.values()):
        weigh = experts * rows * columns
        errors.append([relative_error(some, scheme) * weigh for scheme in CANDIDATES])
        sizes.append([experts * packed_bytes(rows, columns, scheme) for scheme in CANDIDATES])
    try:
        chosen = allocate(errors, sizes, int(bits * sum(counts) / 8))
    except InputError as error:
        raise OptionError(f"quantize='{bits:g}bpw' is too small: {error}") from None
    return {path: str(CANDIDATES[one]) for path, one in zip(matrices, chosen, strict=True)}


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

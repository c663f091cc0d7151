"""Turn `quantize="4.5bpw"` into a scheme for each projection of a model.

Which block deserves the bits is a question about all of them, and a graph shows one, without its
weights. So the choice is made where the whole model is at hand: when it is given to torch.compile.
What the backend is given then is a mapping, as a user could have written it, and reports show it.

Errors are those of a few experts of each matrix, and all experts of a block get the same scheme:
one call of a kernel reads all of them.
"""

import weakref
from collections.abc import Iterator
from dataclasses import replace
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
        known[bits] = _choose(dict(_matrices(model)), bits)
    return replace(options, quantize=known[bits])


def _choose(matrices: dict[str, torch.Tensor], bits: float) -> dict[str, str]:
    if not matrices:
        raise OptionError(
            f"quantize='{bits:g}bpw' found no fused expert weights in this model to choose for; "
            "give a mapping such as {'*.down_proj': 'int8', '*': 'int4'}"
        )
    counts = [one.numel() for one in matrices.values()]
    with torch.no_grad():
        errors = [
            [relative_error(_some(one), scheme) * one.numel() for scheme in CANDIDATES]
            for one in matrices.values()
        ]
    sizes = [
        [len(one) * packed_bytes(one.shape[1], one.shape[2], scheme) for scheme in CANDIDATES]
        for one in matrices.values()
    ]
    try:
        chosen = allocate(errors, sizes, int(bits * sum(counts) / 8))
    except InputError as error:
        raise OptionError(f"quantize='{bits:g}bpw' is too small: {error}") from None
    return {path: str(CANDIDATES[one]) for path, one in zip(matrices, chosen, strict=True)}


def _some(weights: torch.Tensor) -> list[torch.Tensor]:
    step = max(1, len(weights) // _SAMPLE)
    return [weights[expert] for expert in range(0, len(weights), step)][:_SAMPLE]


def _matrices(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the expert matrices [E, N, K] of transformers' fused experts, output-major."""
    for path, module in named_modules(model):
        experts: Any = module
        if not (hasattr(experts, "down_proj") and hasattr(experts, "is_transposed")):
            continue
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        for name, projection in ((first, "gate_up_proj"), ("down_proj", "down_proj")):
            weights: torch.Tensor = getattr(experts, name).detach()
            if weights.is_meta:
                raise OptionError(f"{path}.{name} holds no data to choose by; load it first")
            yield f"{path}.{projection}", weights.mT if experts.is_transposed else weights

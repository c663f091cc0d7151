"""Make the random inputs that a module is observed on."""

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

Inputs = tuple[torch.Tensor, ...]
Maker = Callable[[int, int, int], Inputs]
"""Makes inputs from batch size, length and the number of active experts."""
_WIDTHS = 3
"""How many guesses at the hidden size are tried."""
_OTHERS = ((1, 1), (3, 17), (7, 1), (2, 150))
"""Batch and length of the inputs that a rewrite is tried on, beside those it was made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What inputs have to fit."""

    hidden: int
    experts: int
    dtype: torch.dtype
    device: torch.device


def guess_shapes(module: nn.Module, experts: int = 2) -> Iterator[Shape]:
    """Guess a block's shapes by those of its weights, the likeliest first.

    `experts` is for a block that has no stacked weights.
    """
    weights = [one for one in module.parameters() if one.dim() >= 2]
    widths = Counter(size for weight in weights for size in weight.shape[-2:])
    counts = {weight.shape[0] for weight in weights if weight.dim() == 3} or {experts}
    for width, _ in widths.most_common(_WIDTHS):
        first = weights[0]
        yield Shape(hidden=width, experts=min(counts), dtype=first.dtype, device=first.device)


def makers(module: nn.Module, shape: Shape) -> Iterator[Maker]:
    """List what a forward could want, by the number of its arguments: hidden states, or routed."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    wanted = [one for one in parameters if one.kind in kinds and one.default is one.empty]

    def hidden(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, shape.hidden, dtype=shape.dtype, device=shape.device)

    def routed(batch: int, length: int, active: int) -> Inputs:
        scores = torch.rand(batch * length, shape.experts, device=shape.device)
        weights, ids = scores.softmax(-1).topk(active)
        return hidden(batch * length), ids, weights.to(shape.dtype)

    def batched(batch: int, length: int, active: int) -> Inputs:
        _, ids, weights = routed(batch, length, active)
        return hidden(batch, length), ids, weights

    if len(wanted) == 1:
        yield lambda batch, length, _: (hidden(batch, length),)
        yield lambda batch, length, _: (hidden(batch * length),)
    elif len(wanted) == 3:
        for make, order in itertools.product((routed, batched), itertools.permutations(range(3))):
            yield _reordered(make, order)


def _reordered(make: Maker, order: tuple[int, ...]) -> Maker:
    def made(batch: int, length: int, active: int) -> Inputs:
        inputs = make(batch, length, active)
        return tuple(inputs[place] for place in order)

    return made


def first_inputs(make: Maker, shape: Shape) -> Inputs:
    """Make what a module is recorded on: half of the tokens alike, so that capacities overflow."""
    length = max(16, min(128, 2 * shape.experts))
    inputs = make(2, length, min(2, shape.experts))
    if len(inputs) == 1:
        inputs[0][..., length // 2 :, :] = inputs[0][..., :1, :]
    return inputs


def other_inputs(make: Maker, shape: Shape) -> Iterator[Inputs]:
    """Make inputs of other sizes, and one where all tokens are alike: capacities overflow."""
    active = min(2, shape.experts)
    for batch, length in _OTHERS:
        yield make(batch, length, active)
    yield make(2, 5, 1)
    yield make(1, 6, min(3, shape.experts))
    alike = make(2, 64, active)
    yield tuple(_first_only(one) for one in alike)


def _first_only(tensor: torch.Tensor) -> torch.Tensor:
    first = tensor[:1, :1] if tensor.dim() == 3 else tensor[:1]
    return first.expand_as(tensor).contiguous()

"""Give a copy of a block other numbers where its experts have no part, and keep theirs to them.

A scale that is one, a bias that is zero and a shared expert that adds next to nothing do not show
in what a module computes, at present. They are part of it all the same: the next layer, or the
next checkpoint, has others.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Node

from moecc.observe.recorder import Recorder
from moecc.observe.unrecordable import Unrecordable

_FEW = 2**26
"""Larger matrices are not copied."""


def give_other_weights(copy: nn.Module, experts: Sequence[nn.Module]) -> None:
    """Put noisy parameters in the place of all but stacked ones and those of experts."""
    theirs = {id(one) for expert in experts for one in expert.parameters()}
    others: dict[int, nn.Parameter] = {}
    generator = torch.Generator().manual_seed(0)
    for holder in copy.modules():
        for name, one in [*holder._parameters.items()]:  # pyright: ignore[reportPrivateUsage]
            if one is None or id(one) in theirs or not _is_plain(one):
                continue
            if id(one) not in others:
                noise = torch.randn(one.shape, generator=generator)
                noise /= one.shape[-1] ** 0.5 if one.dim() > 1 else 2
                others[id(one)] = nn.Parameter(one.detach() + noise.to(one), requires_grad=False)
            holder._parameters[name] = others[id(one)]  # pyright: ignore[reportPrivateUsage]


def _is_plain(one: torch.Tensor) -> bool:
    small = one.dim() <= 2 and one.numel() <= _FEW
    return small and type(one) is nn.Parameter and one.is_floating_point() and not one.is_meta


def check_reads_no_expert(
    recorder: Recorder, module: nn.Module, experts: Sequence[nn.Module]
) -> None:
    """Raise `Unrecordable` if a module itself reads weights of its experts, who were replaced."""
    theirs = {id(one) for expert in experts for one in expert.parameters()}
    paths = {path for path, one in module.named_parameters() if id(one) in theirs}
    if any(node.target in paths for node in recorder.graph.find_nodes(op="get_attr")):
        raise Unrecordable("it reads weights of its experts for something else")


def check_only_multiplied(recorder: Recorder, products: set[Node], paths: set[str]) -> None:
    """Raise `Unrecordable` if stacked weights go anywhere but into products of experts."""
    for node in recorder.graph.nodes:
        value = node.meta.get("example_value")
        if "slice" in node.meta or node in products or not isinstance(value, torch.Tensor):
            continue
        read = {one.meta["slice"].path for one in node.all_input_nodes if "slice" in one.meta}
        if not read.isdisjoint(paths):
            raise Unrecordable("it reads weights of its experts for something else")

"""Stand in for weights that are not in memory.

A model keeps a parameter where its experts would be: right in shape and dtype, one row of NaN in
memory, seen from everywhere. The kernel of the block asks the bank that is bound to it instead.
Whoever else reads it gets NaN, which shows, where a meta tensor gives silent garbage.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from moecc.runtime.errors import InputError
from moecc.runtime.modules import parameters_of
from moecc.runtime.schemes.scheme import Schemes

_ATTRIBUTE = "moecc_lender"


class Lender(Protocol):
    """What computes a block whose experts are not its model's own tensors."""

    @property
    def schemes(self) -> Schemes | None:
        """Of the weights; None where they have the model's own dtype and layout."""
        ...

    def run(
        self,
        add: Callable[..., None],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *biases: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the block with its kernel."""
        ...

    def foretell(self, scores: torch.Tensor, active: int, distance: int) -> None:
        """Take note that the block will likely choose the best of `scores` [T, E]."""
        ...

    def recall(self, tokens: torch.Tensor, active: int) -> None:
        """Take note that the block will choose experts for these tokens [T]."""
        ...


def stand_in(
    like: torch.Tensor, lender: Lender, device: torch.device | str = "cpu"
) -> nn.Parameter:
    """Make a parameter of the shape and dtype of `like`, bound to a lender."""
    row = torch.full(like.shape[-1:], torch.nan, dtype=like.dtype, device=device)
    parameter = nn.Parameter(row.expand(like.shape), requires_grad=False)
    bind(parameter, lender)
    return parameter


def bind(parameter: nn.Parameter, lender: Lender) -> None:
    """Let a stand-in ask this lender from now on."""
    setattr(parameter, _ATTRIBUTE, lender)


def is_stand_in(weight: object) -> bool:
    """Tell whether a tensor is one, wherever the model was moved since."""
    return hasattr(weight, _ATTRIBUTE)


def lender_of(weight: torch.Tensor) -> Lender | None:
    """Give the lender that a weight is bound to.

    Raises `InputError` when the model was moved or cast, which fills the stand-in with NaN.
    """
    lender: Lender | None = getattr(weight, _ATTRIBUTE, None)
    if lender is not None and weight.shape[0] > 1 and weight.stride(0) != 0:
        raise InputError(
            "the model was moved or cast after its experts were left on disk; "
            "say device and dtype when it is loaded"
        )
    return lender


def refuse_absent(module: nn.Module, why: str) -> None:
    """Raise `InputError` where a module's own code would compute with experts that are on disk."""
    if any(map(is_stand_in, module.parameters())):
        raise InputError(
            f"the experts of {type(module).__name__} are on disk, where only moecc's kernels read "
            f"them, and no kernel runs: {why}"
        )


def put_in(
    module: nn.Module,
    names: list[str],
    like: list[torch.Tensor],
    lender: Lender,
    device: torch.device | str = "cpu",
) -> None:
    """Put stand-ins in place of parameters, and let nobody save them."""
    for name, tensor in zip(names, like, strict=True):
        parameters_of(module)[name] = stand_in(tensor, lender, device)
    module.register_state_dict_pre_hook(refuse_to_save)


def refuse_to_save(module: nn.Module, *_: Any) -> None:
    """Raise `InputError` before a state dictionary is made of NaN."""
    raise InputError(
        f"the experts of {type(module).__name__} are on disk, not in the model, so its state "
        "cannot be saved; copy the checkpoint that it was loaded from, or save it before"
    )

"""Keep the experts of a block, which the model holds as many small parameters, in one tensor each.

Kernels read experts from `[E, ., .]` tensors. A model with a module for each expert gets its
parameters moved into such a tensor, once, and each parameter becomes a view of its place there:
weights exist once, the model's own code and `state_dict` see what they always saw, and an optimizer
or `load_state_dict` writes where kernels read.

Parameters can be moved away again behind our back (`.data = ...`, `load_state_dict(assign=True)`).
So whoever is about to read a bank calls `refresh`, which looks at every parameter's address and
copies back what has moved.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from moecc.runtime.errors import InputError
from moecc.runtime.modules import children_of, parameters_of

_ATTRIBUTE = "moecc_bank"

Place = tuple[nn.Module, str]
"""A module and the name of its parameter."""


class Bank:
    """The tensors of one block's experts and where the model's parameters lie in them.

    `tensors[name]` is [E, ...]; `parts[name][e]` lists the parameters that lie one after another in
    `tensors[name][e]`.
    """

    def __init__(
        self,
        block: nn.Module,
        experts: Sequence[nn.Module],
        parts: Mapping[str, Sequence[Sequence[Place]]],
    ) -> None:
        """Move the parameters of a block's experts into tensors of their own.

        Raises `InputError` when they are not alike, shared, or without data.
        """
        self.tensors: dict[str, torch.Tensor] = {}
        inside = {module for expert in experts for module in expert.modules()}
        self._links = [
            (children_of(parent), name, child)
            for parent in block.modules()
            for name, child in children_of(parent).items()
            if child is not None and not inside.isdisjoint(child.modules())
        ]
        self._places: list[tuple[dict[str, nn.Parameter | None], str, torch.Tensor, int]] = []
        seen: set[int] = set()
        found = {
            name: [[_parameter(place, seen) for place in places] for places in every]
            for name, every in parts.items()
        }  # before anything moves
        for name, every in parts.items():
            bank = torch.stack([torch.cat(one) for one in found.pop(name)])
            for number, places in enumerate(every):
                self._place(bank[number], places)
            setattr(bank, _ATTRIBUTE, self)
            self.tensors[name] = bank

    def _place(self, row: torch.Tensor, places: Sequence[Place]) -> None:
        start = 0
        for owner, name in places:
            parameter = cast(nn.Parameter, parameters_of(owner)[name])
            parameter.data = view = row[start : start + parameter.shape[0]]
            start += parameter.shape[0]
            self._places.append((parameters_of(owner), name, view, view.data_ptr()))

    def first_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give the parameter that lies first in one of the tensors."""
        for parameters, name, _, address in self._places:
            if address == tensor.data_ptr() and (found := parameters[name]) is not None:
                return found
        return tensor

    def refresh(self) -> int:
        """Copy back every parameter that has moved; return how many had.

        Raises `InputError` when the experts are no longer those that were compiled.
        """
        for children, name, child in self._links:
            if children.get(name) is not child:
                raise InputError(
                    f"expert module {name!r} was replaced after torch.compile; {_AGAIN}"
                )
        moved = 0
        for parameters, name, view, address in self._places:
            now = parameters.get(name)
            if now is None or (now.data_ptr() != address and not _fits(now, view)):
                raise InputError(
                    f"expert parameter {name!r} changed its shape, dtype or device after "
                    f"torch.compile; {_AGAIN}"
                )
            if now.data_ptr() != address:
                view.copy_(now.data)
                now.data = view
                moved += 1
        return moved


_AGAIN = "call torch.compile(model, backend='moecc') again"


def refresh(weight: torch.Tensor) -> None:
    """Bring a weight up to date if it belongs to a bank."""
    bank = getattr(weight, _ATTRIBUTE, None)
    if bank is not None:
        bank.refresh()


def anchor(weight: torch.Tensor) -> torch.Tensor:
    """Give the model's parameter at the beginning of a bank's tensor; any other weight itself."""
    bank: Bank | None = getattr(weight, _ATTRIBUTE, None)
    return weight if bank is None else bank.first_of(weight)


_moving = threading.Lock()


def together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """See the parameters of E experts, which are alike and contiguous, as one tensor [E, ..].

    The first time they are moved into one piece of memory, and again if they have left it. For
    graphs, which are given the parameters in every call, so that nothing has to be remembered.
    """
    first = parts[0]
    if not _lie_together(parts):
        with _moving, torch.inference_mode(False):
            if not _lie_together(parts):
                rows = torch.stack([part.detach() for part in parts])
                for part, row in zip(parts, rows, strict=True):
                    part.data = row
    size = first.numel()
    return first.detach().as_strided((len(parts), *first.shape), (size, *first.stride()))


def _lie_together(parts: Sequence[torch.Tensor]) -> bool:
    """Tell whether tensors lie one after another, in memory that belongs together."""
    first, start = parts[0], parts[0].data_ptr()
    step = first.numel() * first.element_size()
    if any(part.data_ptr() != start + number * step for number, part in enumerate(parts)):
        return False
    memory = first.untyped_storage()
    return start + len(parts) * step <= memory.data_ptr() + memory.nbytes()


def _fits(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    same = (tensor.shape, tensor.dtype, tensor.device) == (view.shape, view.dtype, view.device)
    return same and not tensor.is_meta


def _parameter(place: Place, seen: set[int]) -> torch.Tensor:
    owner, name = place
    parameter = parameters_of(owner).get(name)
    if type(parameter) is not nn.Parameter or parameter.is_meta:
        kind = type(parameter).__name__
        raise InputError(f"expert parameter {name!r} is a {kind} without data of its own")
    if id(parameter) in seen:
        raise InputError(f"expert parameter {name!r} is shared between experts")
    seen.add(id(parameter))
    return parameter.data

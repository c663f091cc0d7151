"""Say what a factor of a product is: a value, and the axes that it is indexed with."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Node

from moecc.passes.axes import Axis, Dim, Dims, View, leaves, tensor_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """Which half of its matrix's rows a factor takes: `w[ids].chunk(2, dim=1)[index]`."""

    index: int
    taken: Dim
    whole: Dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A node and the axes that it is indexed with in a product."""

    view: View
    ids: View | None = None
    """The choice of matrices: `view` is over experts first, and these ids say which."""
    grouped: bool = False
    """Ids choose by the sorted groups that rows are in, not by an index."""
    half: Half | None = None
    onto: Node | None = None
    """What the value was added onto; only a value that was read first may have it."""
    path: tuple[Node, ...] = ()
    """What lies between the value that was read and this factor."""
    aids: tuple[Node, ...] = ()
    """Index computations that the reading rests on."""

    @property
    def node(self) -> Node:
        """The factor's value."""
        return self.view.node

    @property
    def flat(self) -> Dim:
        """Every axis in memory order."""
        return leaves(axis for dim in self.view.dims for axis in dim)

    @property
    def axes(self) -> frozenset[Axis]:
        """Every axis that the value depends on."""
        return self.view.axes | (self.ids.axes if self.ids else frozenset[Axis]())

    @property
    def dtype(self) -> torch.dtype:
        """The value's dtype."""
        return cast(torch.Tensor, tensor_of(self.node)).dtype

    def back(self, node: Node, dims: Dims, aids: tuple[Node, ...] = (), **more: Any) -> "Factor":
        """Go on to a node that this one was made of."""
        path = (*self.path, self.node)
        return replace(self, view=View(node, dims), path=path, aids=(*self.aids, *aids), **more)


Chain = tuple[Factor, ...]
"""A factor at every step back from where it is used, while values are only rearranged."""


def laid_out(chain: Chain, rows: Dim, columns: Dim) -> Factor | None:
    """Give the step at which a value lies in memory row by row, as a matrix if there is one."""
    wanted, last = leaves((*rows, *columns)), leaves(columns)
    fitting = [one for one in chain if one.ids is None and one.flat == wanted]
    whole = [one for one in fitting if one.view.dims and leaves(one.view.dims[-1]) == last]
    matrices = [one for one in whole if len(one.view.dims) == 2]
    return next(iter((*matrices, *whole, *fitting)), None)

"""Say what the two products of a block consist of, once their axes are known."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from moecc.passes.activation import Activation
from moecc.passes.axes import Dim
from moecc.passes.products.factor import Chain, Factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    """The second product, and what its axes are."""

    activated: Factor
    down: Factor
    weights: Factor | None
    """None where they are in the first product."""
    bias: Factor | None
    tokens: Dim
    choices: Dim
    """K, or E where there are dense gates."""
    inner: Dim
    outer: Dim


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """A first product: of gate and up, or of one of them."""

    hidden: Factor
    matrices: Factor
    weights: Factor | None
    bias: Factor | None
    input_major: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Everything that was read; `first` has two products where gate and up are two."""

    first: tuple[First, ...]
    second: Second
    activation: Activation
    ids: Chain
    """Empty with dense gates."""

    @property
    def chooses(self) -> Literal["index", "groups", "gates"]:
        """Say what picks an expert's matrices."""
        if not self.ids:
            return "gates"
        return "groups" if self.second.down.grouped else "index"

    def factors(self) -> Iterator[Factor]:
        """Give every factor of every product."""
        products = (self.second, *self.first)
        biases = (one.bias for one in products)
        weights = (one.weights for one in products)
        every = (*biases, *weights, self.second.activated, self.second.down)
        first = itertools.chain.from_iterable((one.hidden, one.matrices) for one in self.first)
        return (one for one in (*every, *first) if one is not None)

    def path(self) -> set[Node]:
        """Give every node between the factors and the result, but for the activation."""
        return {node for factor in self.factors() for node in factor.path}

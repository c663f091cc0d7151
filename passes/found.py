"""Say what a style has found in a graph: nodes and facts, before anything is checked or named."""

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from moecc.codegen.activation import Expr
from moecc.passes.ir import Route


class NearMiss(Exception):
    """Something that looks like a block, up to where it does not."""

    def __init__(
        self, node: Node, why: str, key: Node | None = None, fallback: bool = True
    ) -> None:
        super().__init__(why)
        self.node = node
        self.why = why
        self.key = key
        """What tells one block from another: the second product's matrices."""
        self.fallback = fallback
        """It is a block, and moecc leaves it as slow as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One block. Fields are as in `MoeBlock`, with nodes for names."""

    hidden: Node
    ids: Node
    weights: Node
    gate_up: Node
    up: Node | None = None
    down: Node
    gate_up_bias: Node | None = None
    up_bias: Node | None = None
    down_bias: Node | None = None
    learned: Node | None = None
    output: Node
    onto: Node | None = None

    dense_gates: bool = False
    weighs: Literal["output", "input"] = "output"
    wraps: bool = False
    routes: tuple[Route, ...] = ()
    active: int
    activation: Expr
    gated: bool
    interleaved: bool
    transposed: bool
    down_transposed: bool

    work: frozenset[Node]
    """What the fused call computes instead: nobody else may need it."""
    aids: frozenset[Node] = frozenset()
    """Views and index computations that go with it, if nobody else needs them."""
    rests_on: frozenset[Node] = frozenset()
    """What shows that it is a block, and stays."""

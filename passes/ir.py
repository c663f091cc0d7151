"""Name what stages exchange: a graph and everything decided about it so far.

Shape letters: T tokens, H hidden size, I intermediate size, E experts, K active experts a token.
Node fields are FX node names; None stands for an input that the block does not have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import GraphModule, Node

from moecc.codegen.activation import Expr


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeBlock:
    """The experts of one mixture-of-experts layer found in the graph."""

    path: str
    """Module path in the user's model, `model.layers.3.mlp.experts`; a label, never a decision."""
    style: str
    """How the model wrote it: the file in `passes/styles` that recognised it."""
    source: str
    """The user's line, `modeling_qwen3_moe.py:243`, or empty."""

    hidden: str
    """[T, H] entering the experts."""
    ids: str
    """[T, K] the chosen experts."""
    weights: str
    """[T, K] their weights in the sum."""
    gate_up: str
    """[E, 2I, H]; [E, H, 2I] when transposed; I instead of 2I when not gated, or with `up`."""
    up: str | None = None
    """[E, I, H]; [E, H, I] when transposed: gate and up are two tensors, `gate_up` is the gate."""
    down: str
    """[E, H, I]; [E, I, H] when transposed."""
    gate_up_bias: str | None
    down_bias: str | None
    output: str
    """[T, H] the node that everything downstream reads."""
    interior: tuple[str, ...]
    """The nodes that only serve this block."""

    hidden_size: int
    intermediate: int
    experts: int
    active: int
    dtype: torch.dtype
    device: str
    activation: Expr
    gated: bool
    interleaved: bool
    transposed: bool

    @property
    def weight_bytes(self) -> int:
        """Size of all expert matrices of the block."""
        rows = (2 if self.gated else 1) * self.intermediate
        return self.experts * self.hidden_size * (rows + self.intermediate) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the experts of a block live."""

    block: str
    home: Literal["resident"]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowering:
    """The kernel chosen for a block."""

    block: str
    kernel: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A graph plus everything the compiler has decided about it so far.

    The graph is edited in place, as torch does; everything else is replaced.
    """

    gm: GraphModule
    trains: bool = False
    """Gradients were wanted when the graph was traced."""
    blocks: tuple[MoeBlock, ...] = ()
    placements: tuple[Placement, ...] = ()
    lowerings: tuple[Lowering, ...] = ()

    def nodes(self) -> Mapping[str, Node]:
        """Look nodes up by name."""
        return {node.name: node for node in self.gm.graph.nodes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """Something that was looked at and left alone, and why."""

    where: str
    """Module path or node name."""
    why: str
    fallback: bool = False
    """The user asked for more than what now runs; an error with `strict=True`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a pass did."""

    program: Program
    rewrites: int = 0
    misses: tuple[Miss, ...] = ()
    note: str = ""
    """One line for the table of passes."""

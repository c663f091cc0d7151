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
from moecc.codegen.router_spec import RouterSpec
from moecc.passes.router.description import Router
from moecc.passes.shared import SharedExpert
from moecc.runtime.schemes.scheme import Schemes


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A node as [T, K, E], or what of these it depends on: summed, permuted, then reshaped."""

    node: str
    negated: bool = False
    split: int | None = None
    """A dimension of choices x tokens that comes apart before everything else."""
    summed: tuple[int, ...] = ()
    order: tuple[int, ...]
    tokens: bool
    choices: bool
    experts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Some of a token's choices: their weights are the product of `factors` at the `ids`."""

    ids: Seen
    factors: tuple[Seen, ...]
    active: int


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
    """[T, H] entering the experts; its leading dimensions may be several until it is fused."""
    ids: str
    """[T, K] the chosen experts, or what is [T, K] when reshaped to it."""
    weights: str
    """[T, K] their weights in the sum, likewise; [T, E] with `dense_gates`."""
    dense_gates: bool = False
    """`weights` are gates of all E experts, zero but for a token's `ids`, which all differ."""
    weighs: Literal["output", "input"] = "output"
    """What the weights scale: an expert's output, or the token that enters it (Llama 4)."""
    wraps: bool = False
    """An id may be negative, and counts from the last expert then, as an index does."""
    routes: tuple[Route, ...] = ()
    """What ids and weights are made of, side by side; a weight of zero is a dropped choice."""
    onto: str | None = None
    """What the model adds the sum onto, shaped like `output`; None is nothing."""
    gate_up: str
    """[E, 2I, H]; [E, H, 2I] when transposed; I instead of 2I when not gated, or with `up`. Once
    fused, the first of E matrices if experts have one each; `up` and `down` likewise."""
    up: str | None = None
    """[E, I, H]; [E, H, I] when transposed: gate and up are two tensors, `gate_up` is the gate."""
    down: str
    """[E, H, I]; [E, I, H] when down_transposed."""
    gate_up_bias: str | None
    up_bias: str | None = None
    """[E, I] where gate and up have a bias each; `gate_up_bias` is the gate's then, until fused."""
    down_bias: str | None
    learned: str | None = None
    """[E, I], what the activation reads besides."""
    output: str
    """The node that everything downstream reads: [T, H] in the model's own shape."""
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
    """The first product's weights, gate_up and up, are stored input-major."""
    down_transposed: bool
    """The second product's weights are."""

    schemes: Schemes | None = None
    """What the experts are quantized to; None keeps the model's dtype (`quantize_experts`)."""
    router: Router | None = None
    """How `ids` and `weights` are made, as a description (`describe_blocks`)."""
    router_spec: RouterSpec | None = None
    """The kernel that can make them of the logits; None if it is not known (`fuse_routers`)."""
    router_kernel: str = ""
    """The one that does; empty where the model's own nodes do."""
    shared: SharedExpert | None = None
    """The dense MLP whose output is added to the block's, likewise; None if there is none."""

    @property
    def weight_bytes(self) -> int:
        """Size of all expert matrices of the block."""
        rows = (2 if self.gated else 1) * self.intermediate
        return self.experts * self.hidden_size * (rows + self.intermediate) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the experts of a block live."""

    block: str
    home: Literal["resident", "lent"]
    """The model's own tensors, or read from disk when they are needed (`moecc.load`)."""
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """A prediction of the experts that a block will choose."""

    block: str
    """Whose experts are predicted."""
    at: str
    """The earlier block before whose experts it is made."""
    distance: int
    """Blocks between the two, the later one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowering:
    """The kernel chosen for a block."""

    block: str
    kernel: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLinear:
    """A linear layer that a kernel of ours computes."""

    path: str
    """Module path in the user's model, `model.layers.3.self_attn.q_proj`; a label."""
    inputs: int
    outputs: int
    dtype: torch.dtype
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of a few query tokens that a kernel of ours computes."""

    path: str
    """Module path in the user's model, `model.layers.3.self_attn`; a label."""
    heads: int
    """Of queries."""
    shared: int
    """Of keys and values."""
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Callee:
    """Layers that are alike, compiled once and called for each of them."""

    name: str
    """Of the submodule that the graph calls."""
    paths: tuple[str, ...]
    """Of the layers in the user's model, `model.layers.3`; labels."""
    nodes: int
    """Of one layer."""
    severed: tuple[str, ...]
    """What could be fused across a layer's end and is not, `add | pow`."""
    held: frozenset[str]
    """The nodes of all layers, which were the graph's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A graph plus everything the compiler has decided about it so far.

    The graph is edited in place, as torch does; everything else is replaced.
    """

    gm: GraphModule
    trains: bool = False
    """Gradients were wanted when the graph was traced."""
    lent: frozenset[str] = frozenset()
    """The placeholders that stand in for experts on disk."""
    blocks: tuple[MoeBlock, ...] = ()
    placements: tuple[Placement, ...] = ()
    prefetches: tuple[Prefetch, ...] = ()
    lowerings: tuple[Lowering, ...] = ()
    attentions: tuple[Attention, ...] = ()
    linears: tuple[DenseLinear, ...] = ()
    callees: tuple[Callee, ...] = ()
    whole: str = ""
    """Why whoever compiles the graph wants it whole; empty if parts will do."""

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
    node: str = ""
    """The node that stood in the way."""
    source: str = ""
    """The user's line that made it, `modeling.py:243`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a pass did."""

    program: Program
    rewrites: int = 0
    misses: tuple[Miss, ...] = ()
    note: str = ""
    """One line for the table of passes."""

"""Say what a style of writing a MoE block consists of."""

from dataclasses import dataclass
from typing import Any, Literal

from moecc.passes.pattern import Bind, Call, Either, call, either


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """Two patterns around the activation, which is read separately.

    Together they bind `hidden`, `ids`, `weights`, `gate_up`, `down`, and where the model has them
    `gate_up_bias` and `down_bias`. `output` binds `activated`, the second product's input; `first`
    matches the first product. `gate_up_input_major` and `down_input_major` are bound to something
    true when weights lie as [E, inputs, outputs]; `active` and `terms`, when bound, are K and the
    [T, K, H] summed over K.
    """

    name: str
    anchor: str
    """What the block's last node is called."""
    output: Call
    """From the last node back to the second product."""
    first: Call | Either | Bind
    """The first product, from its output back to the tokens."""
    near: int
    """A match that fails after this many nodes is a near miss worth telling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductStyle:
    """Two products over axes around the activation, in whatever spelling (`match_products`)."""

    name: str
    anchors: frozenset[str]
    """What the block's last node may be called."""
    chooses: Literal["index", "groups", "gates"]
    """What picks an expert's matrices: an index, groups of sorted rows, or nothing but gates."""
    weighs: frozenset[str]
    """What the routing weights scale: the experts' `output`, their `input`, or either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchStyle:
    """Tokens copied into their experts' buffers and brought back (`passes/capacity`)."""

    name: str
    anchors: frozenset[str]
    """What the block's last node may be called."""


def flat(pattern: Any) -> Either:
    """Match `pattern` seen as one dimension."""
    return either(call("reshape|view", pattern, -1), call("flatten", pattern))

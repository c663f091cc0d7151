"""Tell a model's own parameters from what its graph computes."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from moecc.passes.axes import tensor_of
from moecc.passes.pattern import op_name

GIVEN = ("placeholder", "get_attr")
"""The kinds of nodes that enter a graph."""


def is_parameter(node: Any) -> bool:
    """Tell whether a node is one of the model's parameters."""
    given = isinstance(node, Node) and node.op in GIVEN
    return given and isinstance(tensor_of(node), nn.Parameter)


def stacked_parameters(node: Node) -> list[Node]:
    """Give the parameters that `torch.stack` lays one after another; none if it is no such call.

    All are in one piece of memory each, and no two are the same.
    """
    if op_name(node) != "stack" or node.kwargs.get("dim", (*node.args, 0)[1]) != 0:
        return []
    parts = [*cast(Sequence[Any], node.args[0])] if isinstance(node.args[0], (list, tuple)) else []
    values = [tensor_of(part) for part in parts if is_parameter(part)]
    plain = all(value is not None and _is_plain(value) for value in values)
    return parts if plain and len(set(parts)) == len(values) == len(parts) else []


def _is_plain(value: torch.Tensor) -> bool:
    """Tell whether a matrix lies in one piece, or stands in for one (`moecc.runtime.offload`)."""
    return value.is_contiguous() or value.stride(0) == 0

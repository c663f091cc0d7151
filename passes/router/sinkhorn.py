"""Recognise Sinkhorn balancing, which is named and not described further.

for _ in range(rounds):
    scores = scores / scores.sum(dim=1, keepdim=True)
    scores = scores / scores.sum(dim=0, keepdim=True)
"""

from typing import Any

from torch.fx import Node

from moecc.passes.router.chain import Read
from moecc.passes.router.steps import Sinkhorn
from moecc.passes.router.values import Values, argument, plain_name, tensor


def read_sinkhorn(values: Values, node: Node) -> Read | None:
    """Read alternating normalisations over tokens and over experts, as long as they last."""
    dims: list[int] = []
    current = node
    while found := _normalised(values, current):
        dim, source = found
        if dims and dims[-1] == dim:
            break
        dims.append(dim)
        current = values.plain(source)
    return (Sinkhorn(len(dims) // 2), current) if len(dims) > 2 else None


def _normalised(values: Values, node: Node) -> tuple[int, Node] | None:
    """Read a division by the sum, or a difference to the logsumexp, over one of two dimensions."""
    source, total = values.plain_operand(node, 0), values.plain_operand(node, 1, "other")
    if not isinstance(source, Node) or not isinstance(total, Node):
        return None
    if (plain_name(node), plain_name(total)) not in (("div", "sum"), ("sub", "logsumexp")):
        return None
    found, dim = tensor(source), argument(total, 1, "dim")
    if values.plain_operand(total, 0) is not source or found is None:
        return None
    dim = _single(dim)
    return (dim % found.dim(), source) if dim is not None else None


def _single(dim: Any) -> int | None:
    if isinstance(dim, (tuple, list)) and len(dim) == 1:  # pyright: ignore[reportUnknownArgumentType]
        dim = dim[0]  # pyright: ignore[reportUnknownVariableType]
    return dim if isinstance(dim, int) else None

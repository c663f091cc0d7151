"""Undo what makes every choice of a token a row of its own.

rows    = hidden.repeat_interleave(K, dim=0)     [T*K, H]
chosen  = ids.reshape(-1, 1)                     [T*K, 1]
shares  = torch.ones_like(chosen)
outputs = experts(rows, chosen, shares)
result  = (norm(outputs).view(T, K, H) * weights.unsqueeze(-1)).sum(1)
"""

from collections.abc import Iterator

from torch.fx import Node

from moecc.passes.router.chain import Read
from moecc.passes.router.masks import filled_with
from moecc.passes.router.values import Values, plain_name, tensor, width

_FLAT = {"reshape", "view", "flatten", "unsqueeze"}
_NEAR = 24
"""Nodes after the block among which its weights are looked for: a norm of each output."""


def read_column(values: Values, node: Node) -> Read | None:
    """Read what was made a single column: nothing happened to the numbers."""
    source = values.operand(node, 0)
    column = plain_name(node) in _FLAT and width(node) == 1
    return (None, source) if column and isinstance(source, Node) else None


def ids_of_tokens(values: Values, ids: Node) -> Node:
    """Give the ids as they were chosen."""
    node = values.plain(ids)
    while found := read_column(values, node):
        node = values.plain(found[1])
    return node


def tokens_of_rows(values: Values, hidden: Node) -> Node:
    """Give the tokens that rows repeat."""
    node = values.plain(hidden)
    while plain_name(node) == "repeat_interleave":
        node = values.plain(values.operand(node, 0))
    return node


def is_one(weights: Node) -> bool:
    """Tell whether the block itself weighs nothing."""
    return filled_with(weights) == 1.0


def later_factors(values: Values, output: Node) -> Iterator[Node]:
    """Give what a block's output is multiplied with later on."""
    found, seen = [output], {output}
    for node in found:
        for user in node.users:
            if user in seen or tensor(user) is None or len(seen) > _NEAR:
                continue
            seen.add(user)
            found.append(user)
            if plain_name(user) == "mul" and len(user.all_input_nodes) == 2:
                yield from (values.plain(one) for one in user.all_input_nodes if one not in seen)

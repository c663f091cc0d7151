"""Recognise Phi-MoE's sparsemixer.

best, id = logits.max(-1, keepdim=True)
near     = logits.masked_fill((best - logits) / logits.abs().clamp(min=best) > 2 * eps, -inf)
weight   = softmax(near, -1).gather(-1, id)

The second choice does the same without the first: `logits.scatter(-1, id, -inf)` is what it takes
the best of and what it masks. Ids and weights are the two choices side by side.
"""

from typing import Any

from torch.fx import Node

from moecc.passes.pattern import Bind, Either, Match, bind, call, either
from moecc.passes.router.steps import SparseMixer
from moecc.passes.router.values import plain_name

_LEAST = float("-inf")


def _pick(number: int, among: Any) -> tuple[Bind, Either]:
    """Match one choice: its id, and its weight."""
    best = bind(f"best{number}", call("max", among, dim=-1, keepdim=True))
    most = call("getitem", best, 0)
    index = bind(f"id{number}", call("getitem", best, 1))
    distance = call("sub", most, bind("logits"))
    scale = call("clamp", call("abs", bind("logits")), min=most)
    far = call("gt", call("truediv|div", distance, scale), bind("within"))
    near = call("softmax", call("masked_fill", among, far, _LEAST), dim=-1)
    weight = either(call("gather", near, dim=-1, index=index), call("gather", near, -1, index))
    return index, weight


_REST = call("scatter", bind("logits"), -1, bind("id1"), _LEAST)
_PICKS = (_pick(1, bind("logits")), _pick(2, _REST))


def read_sparsemixer(ids: Node, weights: Node) -> tuple[SparseMixer, Node] | None:
    """Match two choices side by side; give them and the logits that they choose from."""
    if plain_name(ids) != "cat" or plain_name(weights) != "cat":
        return None
    pairs: list[Any] = [ids.args[0], weights.args[0]]
    if [len(parts) for parts in pairs] != [2, 2]:
        return None
    match = Match()
    for (index, weight), one, other in zip(_PICKS, *pairs, strict=True):
        if not match.find(index, one) or not match.find(weight, other):
            return None
    step = SparseMixer(2, float(match.bindings["within"]))
    return step, match.bindings["logits"]

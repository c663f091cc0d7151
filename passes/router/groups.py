"""Read a choice that is limited to the best groups of experts.

by_group = scores.view(-1, G, E // G)
best     = by_group.topk(2, dim=-1)[0].sum(-1).topk(kept, dim=-1)[1]       or by_group.amax(-1)
mask     = torch.zeros(...).scatter_(1, best, 1)
mask     = mask.unsqueeze(-1).expand(-1, G, E // G).reshape(-1, E)
scores   = scores.masked_fill(~mask.bool(), -inf)
"""

from typing import Any

from torch.fx import Node

from moecc.passes.router.chain import Read
from moecc.passes.router.masks import kept_by, masked
from moecc.passes.router.steps import Groups
from moecc.passes.router.values import (
    Unreadable,
    Values,
    argument,
    is_last,
    plain_name,
    tensor,
    width,
)


def read_groups(values: Values, node: Node) -> Read | None:
    """Read scores of which whole groups are masked."""
    if plain_name(node) in ("flatten", "reshape", "view"):  # masked while apart in groups
        inner = values.plain_operand(node, 0)
        found = masked(values, inner) if width(inner) != width(node) else None
    else:
        found = masked(values, node)
    kept_ids = kept_by(values, found.mask, found.keeps) if found is not None else None
    if found is None or kept_ids is None:
        return None
    best = values.plain_operand(kept_ids, 0)
    if plain_name(kept_ids) != "getitem" or kept_ids.args[1] != 1 or plain_name(best) != "topk":
        raise Unreadable(kept_ids, "groups are chosen in a way that is not known")
    by_group = values.plain_operand(best, 0)
    scored_by, grouped = _scored(values, by_group)
    ungrouped = _ungrouped(values, grouped)
    if ungrouped is not _ungrouped(values, found.scores):
        raise Unreadable(grouped, "groups are chosen by other scores than their experts")
    kept, of, size = argument(best, 1, "k"), width(by_group), width(grouped)
    if not isinstance(kept, int) or of is None or size is None or of * size != width(ungrouped):
        raise Unreadable(best, "groups are not of neighbouring experts")
    return Groups(kept, of, scored_by, found.fill), ungrouped


def _scored(values: Values, scores: Any) -> tuple[str, Node]:
    """Read how a group's score is made of its experts': their best, or the sum of the best few."""
    name, source = plain_name(scores), values.plain_operand(scores, 0)
    if name == "amax" and is_last(argument(scores, 1, "dim"), source):
        return "max", source
    if not isinstance(source, Node):
        raise Unreadable(scores)
    if name == "getitem" and scores.args[1] == 0 and plain_name(source) == "max":
        inner = values.plain_operand(source, 0)
        if is_last(argument(source, 1, "dim"), inner):
            return "max", inner
    if name == "sum" and is_last(argument(scores, 1, "dim"), source):
        best = values.plain_operand(source, 0)
        chosen = plain_name(source) == "getitem" and source.args[1] == 0
        if chosen and plain_name(best) == "topk" and argument(best, 2, "dim", -1) == -1:
            return f"sum of top {argument(best, 1, 'k')}", values.plain_operand(best, 0)
        return "sum", source
    raise Unreadable(scores, "a group's score is made in a way that is not known")


def _ungrouped(values: Values, scores: Node) -> Node:
    """Undo `view(-1, groups, experts a group)`."""
    while plain_name(scores) in ("view", "reshape", "unflatten") and tensor(scores) is not None:
        source = values.plain_operand(scores, 0)
        if not isinstance(source, Node) or width(source) == width(scores):
            break
        scores = source
    return scores

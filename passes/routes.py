"""Write the nodes that make a token's ids [T, K] and weights [T, K] of what a model has instead.

ids     = cat([ids1, ids2], 1)
weights = cat([gates.gather(1, ids1) * kept1.gather(1, ids1), ...], 1)
ids     = ids.masked_fill(weights == 0, E)                      nothing is computed for those
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from moecc.passes.build import Builder
from moecc.passes.ir import Route, Seen
from moecc.passes.sizes import same, same_shape


def build_routes(
    build: Builder,
    routes: Sequence[Route],
    experts: int,
    dtype: torch.dtype,
    nodes: Mapping[str, Node],
) -> tuple[Node, Node]:
    """Give ids [T, K], with `experts` for a choice that is dropped, and weights [T, K]."""
    parts = [_choices(build, route, experts, nodes) for route in routes]
    all_ids, all_weights = parts[0]
    if len(parts) > 1:
        all_ids = build.function(torch.cat, [ids for ids, _ in parts], dim=1)
        all_weights = build.function(torch.cat, [weights for _, weights in parts], dim=1)
    if all_weights.meta["example_value"].dtype != dtype:
        all_weights = build.method("to", all_weights, dtype)
    dropped = build.function(torch.eq, all_weights, 0)
    return build.method("masked_fill", all_ids, dropped, experts), all_weights


def follow_route(route: Route, renamed: Mapping[str, str]) -> Route:
    """Point a route that reads an earlier block's output at what that became."""

    def followed(seen: Seen) -> Seen:
        return replace(seen, node=renamed.get(seen.node, seen.node))

    return replace(route, ids=followed(route.ids), factors=tuple(map(followed, route.factors)))


def _choices(
    build: Builder, route: Route, experts: int, nodes: Mapping[str, Node]
) -> tuple[Node, Node]:
    """Give the ids and weights of one route."""
    ids = _seen(build, route.ids, route.active, experts, nodes)
    weights: Node | None = None
    for factor in route.factors:
        value = _seen(build, factor, route.active, experts, nodes)
        if factor.experts and factor.choices:
            at = build.method("unsqueeze", ids, -1)
            value = build.method("squeeze", _at(build, value, at, factor), -1)
        elif factor.experts:
            value = _at(build, value, ids, factor)
        weights = value if weights is None else build.function(torch.mul, weights, value)
    if weights is None:
        return ids, build.function(torch.ones_like, ids)
    if not same_shape(_shape(weights), _shape(ids)):
        weights = build.method("expand_as", weights, ids)
    return ids, weights


def _at(build: Builder, value: Node, ids: Node, factor: Seen) -> Node:
    """Give a factor's values at the chosen experts.

    Tracing `take_along_dim`, which broadcasts, takes the token count for a constant.
    """
    if factor.tokens:
        return build.function(torch.gather, value, -1, ids)
    return build.function(torch.take_along_dim, value, ids, dim=-1)


def _seen(build: Builder, seen: Seen, active: int, experts: int, nodes: Mapping[str, Node]) -> Node:
    """See a node as [T, K], [T, E] or [T, K, E]; the first two sizes may be one."""
    node = nodes[seen.node]
    if seen.negated:
        node = build.method("logical_not", node)
    if seen.split is not None:
        node = build.method("unflatten", node, seen.split, (active, -1))
    if seen.summed:
        node = build.method("sum", node, dim=list(seen.summed))
    if seen.order != tuple(range(len(seen.order))):
        node = build.method("permute", node, *seen.order)
    sizes = [-1 if seen.tokens else 1]
    if seen.choices or not seen.experts:
        sizes.append(active if seen.choices else 1)
    if seen.experts:
        sizes.append(experts)
    now = _shape(node)
    fits = len(now) == len(sizes) and all(map(same, now[1:], sizes[1:]))
    return node if fits else build.method("reshape", node, *sizes)


def _shape(node: Node) -> torch.Size:
    return node.meta["example_value"].shape

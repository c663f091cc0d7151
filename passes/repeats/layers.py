"""Join windows that repeat side by side into layers, as few and as long as lose no sharing.

prelude a m a m a m end        a: attention, m: experts
→
prelude (a m) (a m) (a m) end

Byte-pair encoding on windows: the commonest pair of neighbours is joined while most of one or the
other occurs in it. Dense first layers, sliding and full attention, state spaces thus become layers
of their own, and what they have in common is compiled once for each.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise

from torch.fx import Node

from moecc.passes.repeats.windows import Window

_LAYER = 60
"""Nodes of a window that is no part of another layer: beside so many, a call costs little."""
Describe = Callable[[Sequence[Node]], Window]


def join(windows: Sequence[Window], describe: Describe) -> list[Window]:
    """Join pairs of neighbours until none is left whose parts are mostly found together.

    Each round is linear in the graph, and rounds are as many as the windows of a layer.
    """
    found = list(windows)
    refused: set[tuple[Hashable, Hashable]] = set()
    while (pair := _commonest(found, refused)) is not None:
        joined = _join(found, pair, describe)
        counts = Counter(one.key for one in joined)
        if max((counts[one.key] for one in {*joined} - {*found} if one.key), default=0) < 2:
            refused.add(pair)
        else:
            found = joined
    return found


def _commonest(
    windows: Sequence[Window], refused: set[tuple[Hashable, Hashable]]
) -> tuple[Hashable, Hashable] | None:
    """Give the keys of the neighbours to join next, the first of those that are as common."""
    kinds = Counter(one.key for one in windows if one.key)
    sizes = {one.key: len(one.nodes) for one in windows}
    pairs = Counter(
        (one.key, other.key)
        for one, other in pairwise(windows)
        if one.key and other.key and one.key != other.key
    )
    usual = {
        pair: count
        for pair, count in pairs.items()
        if count > 1
        and 2 * count >= max(kinds[one] for one in pair)
        and min(sizes[one] for one in pair) < _LAYER
        and pair not in refused
    }
    return max(usual, key=lambda pair: usual[pair]) if usual else None


def _join(
    windows: Sequence[Window], pair: tuple[Hashable, Hashable], describe: Describe
) -> list[Window]:
    joined: list[Window] = []
    for one in windows:
        if joined and (joined[-1].key, one.key) == pair:
            joined[-1] = describe((*joined[-1].nodes, *one.nodes))
        else:
            joined.append(one)
    return joined

"""Read how a block's `ids` were chosen."""

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moecc.passes.router.drops import read_dropped_ids
from moecc.passes.router.factors import looked_up
from moecc.passes.router.masks import selected
from moecc.passes.router.sparsemixer import read_sparsemixer
from moecc.passes.router.steps import SparseMixer, Step, Table, TopK
from moecc.passes.router.values import (
    Unreadable,
    Values,
    argument,
    is_constant,
    is_last,
    last_part,
    plain_name,
    tensor,
    width,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What chose the experts."""

    step: TopK | Table | SparseMixer
    ids: Node
    """The chosen experts as they left the choice, before anything dropped some."""
    scores: Node | None = None
    """[.., E] what the choice goes by; None where it goes by no scores."""
    chosen: Node | None = None
    """[.., K] the chosen scores themselves, if the choice gives them too."""
    after: tuple[Step, ...] = ()
    """What dropped chosen experts."""
    dropped: Node
    """The ids after that."""


def read_choice(values: Values, ids: Node, weights: Node) -> Choice:
    """Read back from `ids`; some choices are known only together with their weights.

    Raises `Unreadable` at a node that is no known way to choose.
    """
    after: list[Step] = []
    node = values.plain(ids)
    while (dropped := read_dropped_ids(values, node)) and dropped[0] is not None:
        after.append(dropped[0])
        node = values.plain(dropped[1])
    choice = _top(values, node) or _table(values, node) or _mixer(values, node, weights)
    if choice is None:
        raise Unreadable(node, "experts are chosen in a way that is not known")
    step, scores, chosen = choice
    return Choice(
        step=step,
        ids=node,
        scores=scores,
        chosen=chosen,
        after=tuple(reversed(after)),
        dropped=ids,
    )


def is_chosen(values: Values, node: Node, choice: Choice) -> Node | None:
    """Give the scores of which `node` holds the chosen ones; None if it does not."""
    name = plain_name(node)
    if choice.chosen is not None and node is choice.chosen:
        return choice.scores
    if name == "getitem" and node.args[1] == 0 and choice.scores is not None:
        first, ours = values.operand(node, 0), values.operand(choice.ids, 0)
        same = (first is ours and tensor(first) is None) or _is_best(values, first, choice)
        return choice.scores if same else None
    if _index(values, node) is not choice.ids:
        found = selected(values, node, choice.ids)
        return found[0] if found is not None else None
    scores = values.plain_operand(node, 0)
    return scores if isinstance(scores, Node) else None


def _is_best(values: Values, node: Node, choice: Choice) -> bool:
    """Tell whether a `max` of its own finds the one score that was chosen."""
    scores = values.plain_operand(node, 0)
    alone = choice.step == TopK(1) and plain_name(node) == "max"
    return alone and scores is choice.scores and is_last(argument(node, 1, "dim"), scores)


def _index(values: Values, node: Node) -> Any:
    """Give what picks one value a row, or K of them."""
    name = plain_name(node)
    if name == "gather":
        dim = argument(node, 1, "dim")
        swapped = dim is None or isinstance(dim, Node)  # take_along_dim(input, indices, dim)
        if not is_last(argument(node, 2, "dim") if swapped else dim, node):
            return None
        place = (1, "indices") if swapped else (2, "index")
        return values.plain_operand(node, *place)
    index: Any = node.args[1] if name == "getitem" else None
    if not isinstance(index, tuple):
        return None
    rows, last = index[0], index[-1]  # pyright: ignore[reportUnknownVariableType]
    counts = isinstance(rows, Node) and _is_arange(values.plain(rows))
    return values.plain(values.at(last, node)) if counts and isinstance(last, Node) else None


def _is_arange(node: Node) -> bool:
    """Recognise 0, 1, 2 and so on."""
    begin: Any = node.args[0] if len(node.args) > 1 else 0
    return plain_name(node) == "arange" and is_constant(begin) and begin == 0


_Found = tuple[TopK | Table | SparseMixer, Node | None, Node | None]


def _top(values: Values, node: Node) -> _Found | None:
    """Read `topk`, `max`, `argmax`, or the begin of a sort."""
    name, source = plain_name(node), values.operand(node, 0)
    if not isinstance(source, Node):
        return None
    if name == "argmax" and is_last(argument(node, 1, "dim"), source):
        return TopK(1), values.plain(source), None
    if name == "getitem" and node.args[1] == 1 and tensor(source) is None:
        return _pair(values, source)
    if name == "getitem" and (k := _leading(node)) is not None:
        inner = source
        if plain_name(inner) == "getitem" and inner.args[1] == 1:
            inner = values.operand(inner, 0)
        if plain_name(inner) in ("sort", "argsort") and _is_descending(inner):
            scores = values.plain_operand(inner, 0)
            return TopK(k), scores, None
    return None


def _pair(values: Values, node: Node) -> _Found | None:
    """Read an operation that gives values and indices."""
    scores, name = values.plain_operand(node, 0), plain_name(node)
    if not isinstance(scores, Node):
        return None
    if name == "max" and is_last(argument(node, 1, "dim"), scores):
        return TopK(1), scores, None
    k, dim = argument(node, 1, "k"), argument(node, 2, "dim", -1)
    largest = argument(node, 3, "largest", True)
    if name != "topk" or not isinstance(k, int) or not is_last(dim, values.operand(node, 0)):
        return None
    if not largest:
        raise Unreadable(node, "it takes the lowest scores")
    return TopK(k), scores, None


def _leading(node: Node) -> int | None:
    """Give k of `x[..., :k]`."""
    part = last_part(node)
    first = part is not None and part.start in (None, 0) and part.step in (None, 1)
    return width(node) if first else None


def _is_descending(node: Node) -> bool:
    dim = argument(node, 1, "dim", -1)
    return argument(node, 2, "descending", False) is True and is_last(dim, node.args[0])


def _table(values: Values, node: Node) -> _Found | None:
    """Read ids that a table holds for an integer input of the graph."""
    table, index = looked_up(values, node)
    if table is None or index is None:
        return None
    while plain_name(index) in ("view", "reshape", "flatten") and index.args:
        index = values.plain_operand(index, 0)
    rows, k = tensor(table), width(node)
    fixed = table.op in ("placeholder", "get_attr") and index.op == "placeholder"
    if rows is None or rows.dim() != 2 or rows.is_floating_point() or not fixed or k is None:
        return None
    count = int(rows.shape[0])
    return Table(k, count), None, None


def _mixer(values: Values, node: Node, weights: Node) -> _Found | None:
    """Recognise choices that are known together with their weights."""
    if plain_name(node) != "cat":
        return None
    weights = values.plain(weights)
    found = read_sparsemixer(node, weights)
    return (found[0], found[1], weights) if found is not None else None

"""Read masks that keep some of the last dimension, and what is spread out over it.

mask  = torch.zeros(T, G).scatter_(-1, ids, 1)       kept are the ids
gates = torch.zeros(T, E).scatter(-1, ids, weights)  weights, each at its expert's place
"""

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moecc.passes.router.chain import Read
from moecc.passes.router.steps import Function, LearnedScale, Normalise, Scale, Spread, Step
from moecc.passes.router.values import (
    Unreadable,
    Values,
    argument,
    is_constant,
    is_last,
    plain_name,
    tensor,
)

_SPREADS = {"expand", "reshape", "view", "unsqueeze", "flatten", "repeat_interleave", "expand_as"}
_CASTS = {"to", "type", "bool", "float", "type_as", "half", "bfloat16", "int", "long"}
_LEAST = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """Scores under a mask."""

    scores: Node
    mask: Node
    keeps: bool
    """Where the mask is true the score stays; otherwise where it is false."""
    fill: float
    """What becomes of the rest."""


def masked(values: Values, node: Any) -> Masked | None:
    """Take a mask off scores."""
    name = plain_name(node) if isinstance(node, Node) else ""
    places = {"masked_fill": (0, 1), "where": (1, 0), "mul": (0, 1), "add": (0, 1)}.get(name)
    if places is None:
        return None
    scores, mask = (values.operand(node, place, "other") for place in places)
    if name in ("mul", "add") and not _is_mask(values, mask):
        scores, mask = mask, scores
    rest = values.operand(node, 2, "value" if name == "masked_fill" else "other")
    fill = filled_with(rest) if isinstance(rest, Node) else rest
    if name == "mul":
        fill = 0.0
    elif name == "add":  # minus infinity where the score does not stay
        fill = _LEAST if _lowers(values, mask) else None
    if not isinstance(scores, Node) or not isinstance(mask, Node) or not is_constant(fill):
        return None
    keeps = name in ("where", "mul")
    return Masked(scores=values.plain(scores), mask=mask, keeps=keeps, fill=float(fill))


def kept_by(values: Values, mask: Node, keeps: bool) -> Node | None:
    """Go from a mask back to the indices that it keeps; None if it is not made of any.

    Raises `Unreadable` if it keeps the others.
    """
    mask, inverted = _unspread(values, mask)
    keeps ^= inverted
    name = plain_name(mask)
    if name in ("sum", "amax", "any"):  # one row for each index, seen together
        hot = values.plain_operand(mask, 0)
        if isinstance(hot, Node) and plain_name(hot) == "one_hot" and _is_second_last(mask, hot):
            return values.plain_operand(hot, 0)
    if name != "scatter":
        return None
    fill, index = filled_with(values.operand(mask, 0)), values.plain_operand(mask, 2, "index")
    put = argument(mask, 3, "value", argument(mask, 3, "src"))
    put = filled_with(put) if isinstance(put, Node) else put
    if fill is None or put is None or not is_last(argument(mask, 1, "dim"), mask):
        return None
    if (bool(fill), bool(put)) != (not keeps, keeps):
        raise Unreadable(mask, "the mask keeps others than it was made from")
    return index if isinstance(index, Node) else None


def read_spread(values: Values, node: Node, ids: Node) -> Read | None:
    """Read weights that were put at their experts' places among all experts."""
    if plain_name(node) != "scatter" or not is_last(argument(node, 1, "dim"), node):
        return None
    fill, index = filled_with(values.operand(node, 0)), values.plain_operand(node, 2, "index")
    source = values.operand(node, 3, "src")
    if fill is None or index is not ids or not isinstance(source, Node):
        return None
    return Spread(fill), source


def selected(values: Values, node: Node, ids: Node) -> tuple[Node, float] | None:
    """Read scores of all experts of which a mask keeps those in `ids`, and what the rest is."""
    found = masked(values, node)
    if found is None or kept_by(values, found.mask, found.keeps) is not ids:
        return None
    return found.scores, found.fill


def without_rest(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Leave out that unchosen experts have nothing where the next steps keep it so."""
    for place, step in enumerate(steps):
        if isinstance(step, Spread):
            later = steps[place + 1 :]
            first = next((one for one in later if isinstance(one, Function)), None)
            zero = step.rest == 0 and all(
                isinstance(one, Scale | LearnedScale | Normalise) for one in later
            )
            least = step.rest == _LEAST and first in (Function("softmax"), Function("sigmoid"))
            if zero or least:
                return without_rest((*steps[:place], *later))
    return steps


def filled_with(base: Any) -> float | None:
    """Give the constant that a tensor was made of."""
    if not isinstance(base, Node):
        return None
    name = plain_name(base)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    if name in ("ones", "ones_like", "new_ones"):
        return 1.0
    value = argument(base, 2 if name == "new_full" else 1, "fill_value")
    return (
        float(value) if name in ("full", "full_like", "new_full") and is_constant(value) else None
    )


def _unspread(values: Values, mask: Node) -> tuple[Node, bool]:
    """Undo casts of a mask, and views that repeat each of its columns for its neighbours.

    Tells whether it is inverted.
    """
    inverted = False
    while (name := plain_name(mask)) in _SPREADS | _CASTS | {"not", "getitem"} or _tests_zero(mask):
        source = values.operand(mask, 0)
        if not isinstance(source, Node) or not _repeats_columns(mask, source):
            break
        inverted ^= name == "not"
        mask = source
    return mask, inverted


def _lowers(values: Values, mask: Any) -> bool:
    """Tell whether a mask is minus infinity but where zeros were put."""
    if not isinstance(mask, Node) or plain_name(mask) != "scatter":
        return False
    put = argument(mask, 3, "value", argument(mask, 3, "src"))
    return filled_with(values.operand(mask, 0)) == _LEAST and put == 0


def _tests_zero(node: Node) -> bool:
    """Recognise what makes a mask of zeros and ones a mask of truths."""
    return plain_name(node) in ("gt", "ne") and argument(node, 1, "other") == 0


def _repeats_columns(node: Node, source: Node) -> bool:
    """Tell whether copies of a column come to lie together: only a new last dimension is repeated.

    Sizes are compared as text, since comparing symbols would guard them.
    """
    name, after, before = plain_name(node), tensor(node), tensor(source)
    if after is None or before is None:
        return False
    old, new = list(map(str, before.shape)), list(map(str, after.shape))
    if name == "repeat_interleave":
        return is_last(argument(node, 2, "dim"), source)
    if name in ("expand", "expand_as"):
        return old[:-1] == new[:-1]
    if name in ("view", "reshape", "flatten") and len(new) < len(old):
        return new[-1] == str(before.shape[-1] * before.shape[-2])
    return new in (old, [*old, "1"])


def _is_mask(values: Values, node: Any) -> bool:
    if not isinstance(node, Node):
        return False
    root = _unspread(values, node)[0]
    hot = values.plain_operand(root, 0) if plain_name(root) in ("sum", "amax") else root
    one_hot = isinstance(hot, Node) and plain_name(hot) == "one_hot"
    return one_hot or filled_with(values.operand(root, 0)) is not None


def _is_second_last(total: Node, of: Node) -> bool:
    dim, found = argument(total, 1, "dim"), tensor(of)
    return found is not None and dim in (-2, found.dim() - 2)

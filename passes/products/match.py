"""Read experts from products over axes, whichever way the model spells them.

    out[t, g] = sum_kf  act[t, k, f] * down[ids[t, k]][f, g] * weights[t, k]
    act       = activation of      sum_h hidden[t, h] * gate_up[ids[t, k]][h, r]

With dense gates there is an axis of experts where k and ids are: gates[t, e] and down[e]. Weights
may stand in the first product instead of the second one. Which axis is which follows from who has
it: g is the output's, t the output's other ones, k the rest of what ids are indexed with, f what
the second product sums over, h what the first one does.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from moecc.passes.activation import UnreadableActivation, read_activation
from moecc.passes.axes import Axis, Dim, Dims, View, leaves, shape_of, tensor_of, through_layout
from moecc.passes.found import NearMiss
from moecc.passes.products.contraction import Reading
from moecc.passes.products.experts import Experts, First, Second
from moecc.passes.products.factor import Chain, Factor, laid_out
from moecc.passes.sizes import same_shape


@dataclass(frozen=True, slots=True)
class _Factors:
    """The factors of a product in some order, and what is added to it."""

    rows: Chain
    matrices: Chain
    weights: Chain | None
    bias: Chain | None


def read_experts(node: Node) -> Experts | None:
    """Read a node as the weighted sum of experts; None if nothing about it looks like one.

    Raises `NearMiss` where matrices are chosen by ids or the experts are there, but no block is.
    """
    miss: NearMiss | None = None
    for count in (3, 2):
        reading = Reading()
        root = reading.start(node)
        seconds = (_second(reading, root, given) for given in _readings(reading, root, count, 2))
        for second in filter(None, seconds):
            try:
                return _complete(reading, second)
            except (NearMiss, UnreadableActivation) as stop:
                if second.down.ids is not None:  # without, every sum of products comes this far
                    miss = miss or _told(stop, second)
    if miss is not None:
        raise miss
    return None


def _told(stop: NearMiss | UnreadableActivation, second: Second) -> NearMiss:
    if isinstance(stop, NearMiss):
        return stop
    why = f"the activation is not one that kernels compute: {stop}"
    return NearMiss(second.activated.node, why, second.down.node)


def _readings(reading: Reading, root: Factor, count: int, biased: int) -> Iterator[_Factors]:
    """Read a product of `count` factors; a bias may be added to the product of `biased` of them."""
    cuts = [(cut, None) for cut in reading.cuts(root, count)]
    for cut in reading.cuts(root, count - biased + 1):
        for place, chain in enumerate(cut):
            if (parts := reading.biased(chain[-1])) is not None:
                others, bias = cut[:place] + cut[place + 1 :], reading.chain(parts[1])
                cuts += [((*inside, *others), bias) for inside in reading.cuts(parts[0], biased)]
    for factors, bias in cuts:
        for rows, matrices, *weights in itertools.permutations(factors):
            yield _Factors(rows, matrices, weights[0] if weights else None, bias)


def _second(reading: Reading, root: Factor, given: _Factors) -> Second | None:
    """Name the axes, if these are activated rows, matrices and weights in this order."""
    down, activated, output = _matrices(given.matrices), given.rows[-1], root.flat
    if down is None or down.half is not None:
        return None
    experts, *sides = map(leaves, down.view.dims)
    outer = next((side for side in sides if {*side} <= {*output}), ())
    inner = next((side for side in sides if side != outer), ())
    tokens = output[: len(output) - len(outer)]
    chosen = leaves(axis for dim in down.ids.dims for axis in dim) if down.ids else experts
    choices = tuple(axis for axis in chosen if axis not in tokens)
    named = {*tokens} <= {*chosen} if down.ids else experts and choices == experts
    if not (outer and inner and named and _apart(tokens, choices, inner, outer)):
        return None
    if output != (*tokens, *outer) or reading.unsorted(activated) != {*tokens, *choices, *inner}:
        return None
    weights = laid_out(given.weights, tokens, choices) if given.weights else None
    bias = _bias(given.bias, down, outer) if given.bias else None
    if bool(weights) != bool(given.weights) or bool(bias) != bool(given.bias):
        return None
    return Second(
        activated=activated,
        down=down,
        weights=weights,
        bias=bias,
        tokens=tokens,
        choices=choices,
        inner=inner,
        outer=outer,
    )


def _apart(*axes: Dim) -> bool:
    """Tell whether no axis plays two parts."""
    every = leaves(itertools.chain.from_iterable(axes))
    return len({*every}) == len(every)


def _matrices(chain: Chain) -> Factor | None:
    """Give [E, ., .] as it is stored, if a factor is that, chosen or for all experts."""
    fitting = [
        one
        for one in chain
        if len(one.view.dims) == 3
        and one.dtype == chain[0].dtype
        and all(map(leaves, one.view.dims))
    ]
    chosen = [one for one in fitting if one.ids is not None] or fitting
    stored = [one for one in chosen if cast(Any, tensor_of(one.node)).is_contiguous()]
    return next(reversed(stored or chosen), None)


def _bias(chain: Chain, matrices: Factor, columns: Dim) -> Factor | None:
    """Give [E, columns] of the same experts as `matrices`."""
    experts = leaves(matrices.view.dims[0])
    for one in chain:
        dims = tuple(map(leaves, one.view.dims))
        if len(dims) != 2 or dims[1] != leaves(columns) or one.half is not None:
            continue
        if dims[0] == experts if matrices.ids is None else _same_choice(one, matrices):
            return one
    return None


def _same_choice(one: Factor, other: Factor) -> bool:
    """Tell whether two factors are chosen by the same ids, indexed alike."""
    if one.ids is None or other.ids is None:
        return False
    return _stripped(one.ids).key == _stripped(other.ids).key


def _stripped(view: View) -> View:
    while (before := through_layout(view)) is not None:
        view = before
    return view


def _complete(reading: Reading, second: Second) -> Experts:
    """Go on from the second product to the tokens."""
    bottom = second.activated
    activation = read_activation(bottom.node)
    dims, rows = bottom.view.dims, second.inner
    halves = activation.gated and activation.up_rows is None
    if halves:
        rows = (Axis(shape_of(activation.rows)[-1]),)
        dims = (*dims[:-1], rows)
    products = [one for one in (activation.rows, activation.up_rows) if one is not None]
    for product in products:
        like = slice(-1) if halves else slice(None)
        same_rows = same_shape(shape_of(product)[like], shape_of(bottom.node)[like])
        if not same_rows or (halves and leaves(bottom.view.dims[-1]) != leaves(second.inner)):
            raise NearMiss(product, "the activation changes the shape", second.down.node)
    first = tuple(_first(reading, second, product, dims, rows) for product in products)
    if len({(one.hidden.node, one.weights and one.weights.node) for one in first}) > 1:
        raise NearMiss(products[1], "gate and up are products of different rows", second.down.node)
    ids = reading.chain(Factor(view=second.down.ids)) if second.down.ids else ()
    experts = Experts(first=first, second=second, activation=activation, ids=ids)
    known = {axis for factor in experts.factors() for axis in factor.axes}
    if lost := reading.lost(experts.path(), known):
        raise NearMiss(lost, "it adds up copies of the same value", second.down.node)
    return experts


def _first(reading: Reading, second: Second, product: Node, dims: Dims, rows: Dim) -> First:
    count = 3 if second.weights is None else 2
    for given in _readings(reading, reading.start(product, dims), count, count):
        found = _first_of(second, rows, given)
        if found is not None:
            return found
    wanted = "weighted tokens" if count == 3 else "tokens"
    why = f"{product.name} is no product of {wanted} with matrices of the same experts"
    raise NearMiss(product, why, second.down.node)


def _first_of(second: Second, rows: Dim, given: _Factors) -> First | None:
    """Find the token's axes, if these are tokens, matrices and weights in this order."""
    found, down = _matrices(given.matrices), second.down
    if found is None or found.onto is not None or found.grouped != down.grouped:
        return None
    experts, *sides = map(leaves, found.view.dims)
    half = found.half
    columns = leaves(half.whole if half else rows)
    if columns not in sides or (half and leaves(half.taken) != leaves(rows)):
        return None
    (width,) = (side for side in sides if side != columns)
    same_experts = _same_choice(found, down) if down.ids else experts == leaves(down.view.dims[0])
    hidden = laid_out(given.rows, second.tokens, width)
    if hidden is None or not same_experts:
        return None
    if not _apart(second.tokens, second.choices, rows, width):
        return None
    if any(one.axes < hidden.axes for one in given.rows):
        why = "tokens are copied for every choice, and a token's choices are not added up"
        raise NearMiss(hidden.node, why, down.node)
    weights = laid_out(given.weights, second.tokens, second.choices) if given.weights else None
    bias = _bias(given.bias, found, rows) if given.bias else None
    if bool(weights) != bool(given.weights) or bool(bias) != bool(given.bias):
        return None
    input_major = sides[1] == columns
    return First(hidden=hidden, matrices=found, weights=weights, bias=bias, input_major=input_major)

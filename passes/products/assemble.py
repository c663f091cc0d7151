"""Make a block of what was read: check what reading does not show, and choose its inputs."""

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from moecc.codegen.activation import GATE, UP, Expr
from moecc.passes.activation import substitute
from moecc.passes.axes import (
    leaves,
    over_own_axes,
    shape_of,
    size_along,
    tensor_of,
    through_layout,
)
from moecc.passes.found import Found, NearMiss
from moecc.passes.pattern import op_name
from moecc.passes.products.choice import chosen_from
from moecc.passes.products.contraction import PRODUCTS
from moecc.passes.products.experts import Experts
from moecc.passes.products.factor import Factor, laid_out
from moecc.passes.products.gates import read_sparse
from moecc.passes.router.values import Values
from moecc.passes.sizes import known

_DENSE = "its gates are not zero outside of a top-k that the graph shows, so every expert is used"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What chooses experts, and what shows that it does."""

    ids: Node
    active: int
    wraps: bool = False
    rests_on: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _First:
    """The first product's matrices and biases, one of each or two."""

    gate_up: Node
    up: Node | None
    bias: Node | None
    up_bias: Node | None
    activation: Expr


def assemble(values: Values, experts: Experts, output: Node) -> Found:
    """Make the block.

    Raises `NearMiss` for what is none after all, or none that kernels compute.
    """
    second, first = experts.second, _first(experts)
    gate, down = experts.first[0], second.down
    weights = second.weights or gate.weights
    assert weights is not None, "every reading has weights"
    weighs: Literal["output", "input"] = "input" if second.weights is None else "output"
    if len({one.input_major for one in experts.first}) > 1:
        raise _miss(experts, gate.matrices, "gate and up store their matrices in different layouts")
    if experts.ids:
        choice = _indexed(values, experts, output)
    else:
        choice = _dense(values, experts, weights, output)
        if weighs == "input":
            _check_silent(experts, first)
    _check_dtypes(experts, weights)
    work, aids = _parts(experts, output)
    return Found(
        hidden=gate.hidden.node, ids=choice.ids, weights=weights.node,
        gate_up=first.gate_up, up=first.up, down=down.node,
        gate_up_bias=first.bias, up_bias=first.up_bias,
        down_bias=second.bias and second.bias.node, output=output, onto=down.onto,
        dense_gates=not experts.ids, weighs=weighs, wraps=choice.wraps, active=choice.active,
        activation=first.activation, gated=experts.activation.gated,
        interleaved=experts.activation.interleaved, transposed=gate.input_major,
        down_transposed=leaves(down.view.dims[2]) == leaves(second.outer),
        work=work, aids=aids, rests_on=frozenset(choice.rests_on),
    )  # fmt: skip


def _miss(experts: Experts, factor: Factor, why: str, fallback: bool = True) -> NearMiss:
    return NearMiss(factor.node, why, experts.second.down.node, fallback)


def _first(experts: Experts) -> _First:
    """Put gate and up together if they are halves of the same matrices."""
    expr, (gate, *others) = experts.activation.expr, experts.first
    bias = gate.bias and gate.bias.node
    if not others:
        if gate.matrices.half is not None:
            raise _miss(experts, gate.matrices, "one half of its matrices is not used")
        return _First(gate_up=gate.matrices.node, up=None, bias=bias, up_bias=None, activation=expr)
    (up,) = others
    up_bias = up.bias and up.bias.node
    if (bias is None) != (up_bias is None):
        raise _miss(experts, up.matrices, "only one of gate and up has a bias")
    halves = [one.matrices.half.index for one in (gate, up) if one.matrices.half is not None]
    if not halves:
        return _First(
            gate_up=gate.matrices.node, up=up.matrices.node, bias=bias, up_bias=up_bias,
            activation=expr,
        )  # fmt: skip
    if gate.matrices.node is not up.matrices.node or sorted(halves) != [0, 1]:
        raise _miss(experts, up.matrices, "gate and up are not the halves of the same matrices")
    if halves == [1, 0]:
        expr, bias, up_bias = substitute(expr, {GATE: UP, UP: GATE}), up_bias, bias
    return _First(gate_up=gate.matrices.node, up=None, bias=bias, up_bias=up_bias, activation=expr)


def _indexed(values: Values, experts: Experts, output: Node) -> _Choice:
    """Take the ids that matrices were chosen by."""
    second = experts.second
    found = laid_out(experts.ids, second.tokens, second.choices)
    active = known(size_along(second.choices))
    if found is None or active is None:
        raise _miss(experts, experts.ids[0], "ids are not [T, K] with a K that never changes")
    count = chosen_from(values, values.at(experts.ids[-1].node, output))
    total = known(shape_of(second.down.node)[0])
    if count is not None and (total is None or count > total):
        why = f"ids are chosen among {count} experts, and there are matrices for {total}"
        raise _miss(experts, experts.ids[-1], why)
    wraps = count is None and not second.down.grouped
    rests_on = tuple(one.node for one in experts.ids)
    return _Choice(ids=found.node, active=active, wraps=wraps, rests_on=rests_on)


def _dense(values: Values, experts: Experts, gates: Factor, output: Node) -> _Choice:
    """Find the ids that dense gates are zero without."""
    sparse = read_sparse(values, values.at(gates.node, output))
    if sparse is None or sparse.fill != 0.0:
        raise _miss(experts, gates, _DENSE, fallback=False)
    if sparse.active > 1 and chosen_from(values, sparse.ids) is None:
        raise _miss(experts, gates, "its gates may name an expert twice in a row of ids")
    return _Choice(ids=sparse.ids, active=sparse.active, rests_on=sparse.nodes)


def _check_silent(experts: Experts, first: _First) -> None:
    """Hold that an expert whose rows are zero gives zero, as with weights on the input it must."""
    if first.bias is not None or experts.second.bias is not None:
        raise _miss(experts, experts.second.down, "experts that are not chosen add their bias")
    if not _zero_at_zero(first.activation):
        raise _miss(experts, experts.second.down, "experts that are not chosen add a constant")


def _zero_at_zero(expr: Expr) -> bool:
    """Tell whether an activation of nothing is nothing."""
    parts = [_zero_at_zero(arg) for arg in expr.args]
    if not parts:
        return not expr.is_constant or float(expr.op) == 0
    if expr.op in ("max", "min"):
        side = 1 if expr.op == "min" else -1
        harmless = [arg.is_constant and float(arg.op) * side >= 0 for arg in expr.args]
        return any(parts) and all(zero or one for zero, one in zip(parts, harmless, strict=True))
    if expr.op in ("sigmoid", "exp"):
        return False
    if expr.op == "div":
        return parts[0] and expr.args[1].is_constant and not parts[1]
    return any(parts) if expr.op == "mul" else all(parts)


def _check_dtypes(experts: Experts, weights: Factor) -> None:
    """Hold that the block computes as the model does: in the matrices' dtype, nowhere in less."""
    matrices = experts.second.down
    for first in experts.first:
        if first.hidden.dtype.itemsize < matrices.dtype.itemsize:
            raise _miss(experts, first.hidden, f"tokens are {first.hidden.dtype} until they enter")
    for node in experts.path():
        value = tensor_of(node)
        floating = value is not None and value.is_floating_point()
        if value is not None and floating and value.dtype.itemsize < matrices.dtype.itemsize:
            raise NearMiss(node, f"{node.name} is rounded to {value.dtype}", matrices.node)
        if op_name(node) in PRODUCTS and value is not None and not floating:
            raise NearMiss(node, f"{node.name} multiplies {value.dtype}", matrices.node)
    if not weights.dtype.is_floating_point:
        raise _miss(experts, weights, f"routing weights are {weights.dtype}")


def _parts(experts: Experts, output: Node) -> tuple[frozenset[Node], frozenset[Node]]:
    """Tell what computes from what only rearranges."""
    path = {*experts.path(), *experts.activation.nodes, experts.second.activated.node} - {output}
    work = {node for node in path if through_layout(over_own_axes(node)) is None}
    indices = {node for factor in experts.factors() for node in factor.aids}
    return frozenset(work), frozenset((path - work) | indices)

"""Read the router's matrix and what lies between it and the experts' hidden state."""

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moecc.passes.router.chain import Read, Trace, read_constant, read_function, read_part, trace
from moecc.passes.router.factors import read_bias, read_scale
from moecc.passes.router.steps import Earlier, Linear, Logits, Norm, Step
from moecc.passes.router.values import (
    Unreadable,
    Values,
    argument,
    is_constant,
    is_last,
    plain_name,
    tensor,
    width,
)

_NEAR = 40
"""Nodes before the hidden state among which a router's own input is looked for: a norm or two."""
_NORMS = {"rms_norm": "RMS norm", "layer_norm": "layer norm", "normalize": "unit length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """The experts' hidden state, and what it is made from."""

    node: Node
    before: frozenset[Node]

    @staticmethod
    def of(values: Values, hidden: Node) -> "Hidden":
        """Find where the hidden state was computed, and the few nodes before."""
        node = values.plain(hidden)
        before = (one for one in values.cone(node, limit=_NEAR) if _is_matrix(one))
        return Hidden(node=node, before=frozenset(map(values.plain, before)) - {node})


def matrix_of(values: Values, node: Node) -> tuple[Node, Logits] | None:
    """Take a product with a matrix of the model apart: what is multiplied, and the matrix."""
    name, source = plain_name(node), values.operand(node, 0)
    matrix = values.operand(node, 1, "weight" if name == "linear" else "other")
    bias: Any = None
    if name == "linear":
        bias = values.operand(node, 2, "bias")
    elif name == "addmm":
        bias, source, matrix = (values.operand(node, i) for i in range(3))
    elif name == "einsum":
        source, matrix = _einsum_of(values, node)
    elif name != "matmul":
        return None
    classes, features = width(node), width(source)
    if not isinstance(source, Node) or classes is None or features is None:
        return None
    if not _is_parameter(values, matrix):
        raise Unreadable(node, "its matrix is computed")
    return source, Logits(classes, features, bias is not None)


def _einsum_of(values: Values, node: Node) -> tuple[Any, Any]:
    """Take `einsum("td,ed->te", x, matrix)` apart, whatever its letters."""
    equation: Any = node.args[0]
    given: Any = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    left, _, result = str(equation).replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or len(given) != 2 or not all(isinstance(one, Node) for one in given):
        return None, None
    rows, matrix = terms
    classes = result[-1:]
    product = len(matrix) == 2 and result[:-1] == rows[:-1] and set(matrix) == {rows[-1], classes}
    one, other = given
    return (values.at(one, node), values.at(other, node)) if product else (None, None)


def read_input(values: Values, source: Node, hidden: Hidden) -> Trace:
    """Read from what the router's matrix multiplies back to the hidden state."""
    readers = (
        _read_norm, _read_linear, read_function, read_constant, read_scale, read_bias, read_part,
    )  # fmt: skip
    return trace(values, source, readers, lambda node: node is hidden.node or node in hidden.before)


def input_steps(found: Trace, hidden: Hidden) -> tuple[Step, ...]:
    """Say it if the router starts from something earlier than the experts do."""
    earlier = found.stopped is None and found.start is not hidden.node
    return (Earlier(), *found.steps) if earlier else found.steps


def _is_matrix(node: Node) -> bool:
    """Leave the model's own vectors out, such as the weight of a norm."""
    found = tensor(node)
    return found is not None and found.dim() > 1


def _read_linear(values: Values, node: Node) -> Read | None:
    found = matrix_of(values, node)
    return (Linear(found[1].classes), found[0]) if found is not None else None


def _is_parameter(values: Values, value: Any) -> bool:
    """Tell whether a matrix is the model's own, perhaps turned or of another dtype."""
    while isinstance(value, Node) and value.op not in ("placeholder", "get_attr"):
        plain = values.plain(value)
        if plain is value and plain_name(value) not in ("t", "transpose", "getattr", "permute"):
            return False
        value = plain if plain is not value else values.operand(value, 0)
    return isinstance(value, Node)


def _read_norm(values: Values, node: Node) -> Read | None:
    """Read a norm that is one call, or `x * rsqrt(mean(x * x) + eps)` in any spelling."""
    name, source = plain_name(node), values.operand(node, 0)
    if name in _NORMS and isinstance(source, Node):
        return Norm(_NORMS[name]), source
    if name not in ("mul", "div"):
        return None
    for one, other in ((0, 1), (1, 0)) if name == "mul" else ((0, 1),):
        value = values.plain_operand(node, one, "input")
        factor = values.plain_operand(node, other, "other")
        if isinstance(value, Node) and isinstance(factor, Node):
            inverse = _root(factor, "sqrt") if name == "div" else _root(factor, "rsqrt")
            if inverse and _is_mean_square(values, factor, value):
                return Norm("RMS norm"), value
    return None


def _root(node: Node, name: str) -> bool:
    """Tell whether a node is a root, or the reciprocal of one, of what it reads."""
    power = {"rsqrt": -0.5, "sqrt": 0.5}[name]
    exponent = argument(node, 1, "exponent")
    return plain_name(node) == name or (plain_name(node) == "power" and exponent == power)


def _is_mean_square(values: Values, root: Node, of: Node) -> bool:
    mean = values.plain_operand(root, 0)
    if isinstance(mean, Node) and plain_name(mean) == "add":
        mean = values.plain_operand(mean, 0)
    if not isinstance(mean, Node) or plain_name(mean) != "mean" or tensor(mean) is None:
        return False
    square = values.plain_operand(mean, 0)
    if not is_last(argument(mean, 1, "dim"), square) or not isinstance(square, Node):
        return False
    name, exponent = plain_name(square), argument(square, 1, "exponent")
    same = values.plain_operand(square, 0) is of
    squared = name == "square" or (name == "power" and is_constant(exponent) and exponent == 2)
    multiplied = name == "mul" and values.plain_operand(square, 1, "other") is of
    return same and (squared or multiplied)

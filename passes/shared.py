"""Describe the shared expert of a block: a dense MLP that every token goes through.

    output = experts(hidden) + mlp(hidden)
    output = experts(hidden) + sigmoid(gate(hidden)) * mlp(hidden)

It stays ordinary graph nodes. It is found by what is added to the block's output: something that is
computed from the block's hidden state and the model's own tensors alone, which neither attention
nor a residual is.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch.fx import Node

from moecc.passes.router.chain import read_constant, read_function
from moecc.passes.router.description import step_dict
from moecc.passes.router.inputs import matrix_of
from moecc.passes.router.steps import Scale
from moecc.passes.router.values import Unreadable, Values, plain_name, tensor, width
from moecc.passes.source import source_line

_HOPS = 12
"""Nodes from the block's output to where a shared expert is added: casts, views, a scale."""
_MLP = 100
"""Nodes of what is added; what has more is no MLP."""
_PRODUCTS = {"linear", "matmul", "addmm", "bmm", "einsum", "baddbmm"}
_VIEWS = {
    "to", "float", "type", "type_as", "half", "bfloat16", "double", "contiguous", "view", "reshape",
    "flatten", "squeeze", "unsqueeze", "clone", "detach", "view_as", "reshape_as",
}  # fmt: skip
_BETWEEN = _VIEWS | {
    "mul", "div", "add", "sub", "chunk", "split", "getitem", "clamp", "minimum", "maximum", "power",
    "dropout", "t", "transpose",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExpert:
    """What is added to the routed experts' output."""

    intermediate: int | None = None
    """I; None if it was not read."""
    gated: bool = False
    """It has a gate and an up projection."""
    activation: tuple[str, ...] = ()
    """Functions between its products."""
    gate: str = ""
    """What a learned gate of one value a token passes through before it scales the output."""
    then: Scale | None = None
    """What the sum with the routed experts is multiplied with."""
    unknown: str = ""
    """Where reading stopped."""

    def to_dict(self) -> dict[str, Any]:
        """Give the description as plain values."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        then = None if self.then is None else step_dict(self.then)
        return plain | {"text": str(self), "activation": list(self.activation), "then": then}

    def __str__(self) -> str:
        if self.unknown:
            return f"unknown: {self.unknown}"
        kind = " → ".join(self.activation) or "linear"
        gate = f" × {self.gate} gate" if self.gate else ""
        then = f", the sum {self.then}" if self.then else ""
        return f"{'gated ' * self.gated}{kind} MLP of {self.intermediate}{gate}{then}"


@dataclass(frozen=True, slots=True, kw_only=True)
class After:
    """What becomes of a block's output."""

    scales: tuple[Scale, ...] = ()
    """Constants that it is multiplied with before anything is added."""
    shared: SharedExpert | None = None


def read_output(values: Values, hidden: Node, output: Node, onto: Node | None = None) -> After:
    """Follow a block's output to what is added to it; `onto` is what it holds already."""
    hidden, sums = values.plain(hidden), 0
    shared = read_shared(values, onto, hidden, output) if onto is not None else None
    if shared is not None:
        return After(shared=_with_scale(values, shared, output))
    scales: list[Scale] = []
    node = output
    for _ in range(_HOPS):
        step = _next(values, node)
        if step is None:
            break
        scale, other, node = step
        if scale is not None and not sums:
            scales.append(Scale(scale.by, scale.divides, on_output=True))
        if other is None:
            continue
        shared = read_shared(values, other, hidden, output)
        if shared is not None and (not sums or not shared.unknown):
            return After(scales=tuple(scales), shared=_with_scale(values, shared, node))
        sums += 1
        if sums > 1:
            break
    return After(scales=tuple(scales))


def _next(values: Values, node: Node) -> tuple[Scale | None, Node | None, Node] | None:
    """Give the user that carries a value on: a view, a scale of it, or a sum with something."""
    for user in node.users:
        name = plain_name(user)
        if name == "add" and len(user.args) == 2:
            left, right = user.args
            other = right if left is node else left
            if isinstance(other, Node):
                return None, values.at(other, user), user
        elif name in ("mul", "div"):
            found = read_constant(values, user)
            if found is not None and found[1] is node:
                return found[0] if isinstance(found[0], Scale) else None, None, user
        elif name in _VIEWS and user.args[0] is node and tensor(user) is not None:
            return None, None, user
    return None


def _with_scale(values: Values, shared: SharedExpert, total: Node) -> SharedExpert:
    step = _next(values, total)
    return replace(shared, then=step[0]) if step is not None else shared


def read_shared(values: Values, node: Node, hidden: Node, output: Node) -> SharedExpert | None:
    """Describe what is added; None if it is no product of the hidden state with the model's own."""
    cone = list(values.cone(node, stop=hidden, limit=_MLP))
    leaves = [one for one in cone if not one.all_input_nodes and one is not hidden]
    of_model = all(leaf.op in ("placeholder", "get_attr") and _is_float(leaf) for leaf in leaves)
    multiplies = any(plain_name(one) in _PRODUCTS for one in cone)
    if hidden not in cone or output in cone or len(cone) >= _MLP or not (of_model and multiplies):
        return None
    if set(leaves).intersection(values.cone(hidden)):
        return None  # what the hidden state is made from is an input of the graph, and no weight
    try:
        return _read(values, node, hidden)
    except Unreadable as error:
        line = source_line(error.node)
        return SharedExpert(unknown=f"{error.node.name}{f' ({line})' if line else ''}")


def _is_float(node: Node) -> bool:
    value = tensor(node)
    return value is not None and value.is_floating_point()


def _read(values: Values, node: Node, hidden: Node) -> SharedExpert:
    """Read `mlp(hidden)`, perhaps times its gate."""
    node, gate = values.plain(node), ""
    if plain_name(node) == "mul":
        gate, _, node = read_gate(values, node, hidden)
    found = matrix_of(values, node)
    if found is None:
        raise Unreadable(node)
    activated, down = found
    matrices: dict[Node, int] = {}
    functions: list[str] = []
    for one in values.cone(activated, stop=hidden):
        if one is hidden or not one.all_input_nodes:
            continue
        inner = matrix_of(values, one)
        if inner is not None and values.plain(inner[0]) is hidden:
            matrices[one] = inner[1].classes
        elif step := read_function(values, one):
            functions.append(str(step[0]))
        elif plain_name(one) not in _BETWEEN:
            raise Unreadable(one)
    widths = tuple(matrices.values())
    if widths not in ((down.features,), (2 * down.features,), (down.features,) * 2):
        raise Unreadable(node)
    return SharedExpert(
        intermediate=down.features,
        gated=widths != (down.features,),
        activation=tuple(reversed(functions)),
        gate=gate,
    )


def read_gate(values: Values, node: Node, hidden: Node) -> tuple[str, Node, Node]:
    """Take `function(linear(hidden)) * mlp` apart, where the linear has one output.

    Returns the name of the function, the gate and the MLP; raises `Unreadable` for anything else.
    """
    sides = [values.plain_operand(node, 0), values.plain_operand(node, 1, "other")]
    for gate, mlp in (sides, sides[::-1]):
        if not isinstance(gate, Node) or not isinstance(mlp, Node) or width(gate) != 1:
            continue
        step = read_function(values, gate)
        linear = matrix_of(values, values.plain(step[1])) if step else None
        if step and linear and values.plain(linear[0]) is hidden:
            return str(step[0]), gate, mlp
    raise Unreadable(node)

"""Read scores or weights back, one step after the other.

Each reader takes a node and gives the step that made it and the node before that step, or None if
it is not that kind of step. `trace` follows them until an end that its caller knows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from moecc.passes.router.steps import Function, Normalise, Part, Scale, Shift, Step, Unknown
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
from moecc.passes.source import source_line

Read = tuple[Step | None, Node]
Reader = Callable[[Values, Node], Read | None]

_ELEMENTWISE = {
    "sigmoid", "tanh", "relu", "sqrt", "exp", "log", "log_sigmoid", "silu", "gelu", "abs", "square",
    "softplus", "neg", "reciprocal", "rsqrt", "exp2", "softsign", "elu", "log1p", "expm1",
}  # fmt: skip
_LONGEST = 64
"""Steps; a chain that is longer is not a router that this vocabulary describes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A value read back: `made[i]` is the node that step i of `steps` computed."""

    steps: tuple[Step, ...]
    made: tuple[Node, ...]
    start: Node
    """What the first step reads, or the node at which reading stopped."""
    stopped: Unreadable | None = None

    def unknown(self) -> Unknown:
        """Say where reading stopped."""
        return unknown(self.start, self.stopped.why if self.stopped else "")

    @property
    def nodes(self) -> frozenset[Node]:
        """Every value on the way."""
        return frozenset((self.start, *self.made))

    def since(self, node: Node) -> int | None:
        """Give the number of steps up to `node`; None if the chain does not pass it."""
        if node is self.start:
            return 0
        return self.made.index(node) + 1 if node in self.made else None


def unknown(node: Node, why: str) -> Unknown:
    """Name a node that was not read, and its line in the model."""
    return Unknown(node.name, source_line(node), why)


def trace(
    values: Values, value: Node, readers: Sequence[Reader], is_end: Callable[[Node], bool]
) -> Trace:
    """Read back from `value` until `is_end`, or until no reader knows the node."""
    steps: list[Step] = []
    made: list[Node] = []
    stopped: Unreadable | None = None
    try:
        value = values.plain(value)
        while not is_end(value):
            step, source = _read(values, value, readers)
            if step is not None:
                steps.append(step)
                made.append(value)
            value = source
            if len(steps) > _LONGEST:
                raise Unreadable(value, "the chain is too long")
    except Unreadable as error:
        stopped, value = error, error.node
    return Trace(
        steps=tuple(reversed(steps)), made=tuple(reversed(made)), start=value, stopped=stopped
    )


def _read(values: Values, value: Node, readers: Sequence[Reader]) -> Read:
    for reader in readers:
        found = reader(values, value)
        if found is not None:
            return found[0], values.plain(found[1])
    raise Unreadable(value)


def read_function(values: Values, node: Node) -> Read | None:
    """Read a function of each number, or a softmax over the last dimension."""
    name, source = plain_name(node), values.operand(node, 0)
    if not isinstance(source, Node):
        return None
    if name in _ELEMENTWISE:
        return (Function(name), source) if _is_usual(node, name) else None
    if name in ("softmax", "log_softmax"):
        if not is_last(argument(node, 1, "dim"), node):
            raise Unreadable(node, f"{name} does not run over the last dimension")
        return Function(name), source
    if name == "power" and is_constant(exponent := argument(node, 1, "exponent")):
        return Function(f"power {exponent:g}"), source
    return None


def _is_usual(node: Node, name: str) -> bool:
    """Tell whether a function has no parameters but its defaults."""
    usual = {"softplus": (1, 20), "gelu": ("none", "tanh"), "elu": (1,)}.get(name, ())
    given = [*node.args[1:], *(value for key, value in node.kwargs.items() if key != "input")]
    return all(isinstance(value, bool) or value is None or value in usual for value in given)


def read_constant(values: Values, node: Node) -> Read | None:
    """Read a sum, product or quotient with a number; one that changes nothing is no step."""
    name = plain_name(node)
    if name not in ("add", "sub", "mul", "div") or len(node.args) < 2:
        return None
    left, right = values.operand(node, 0), values.operand(node, 1, "other")
    changed = [key for key in ("alpha", "rounding_mode") if node.kwargs.get(key) not in (None, 1)]
    if changed:
        raise Unreadable(node, f"{name} is called with {changed[0]}")
    if is_constant(left) and isinstance(right, Node) and name in ("add", "mul"):
        left, right = right, left
    if not isinstance(left, Node) or not is_constant(right):
        return None
    if name in ("mul", "div"):
        return (None if right == 1 else Scale(float(right), divides=name == "div")), left
    return (None if right == 0 else Shift(float(right) if name == "add" else -float(right))), left


def read_normalisation(values: Values, node: Node) -> Read | None:
    """Read `x / (x.sum(-1, keepdim=True) + eps)` and its relatives."""
    name, source = plain_name(node), values.plain_operand(node, 0)
    if name == "normalize" and isinstance(source, Node):
        if not is_last(argument(node, 2, "dim", 1), node):
            return None
        power, floor = argument(node, 1, "p", 2.0), argument(node, 3, "eps", 1e-12)
        return Normalise(power=float(power), floor=float(floor)), source
    divisor = values.plain_operand(node, 1, "other")
    if name != "div" or not isinstance(source, Node) or not isinstance(divisor, Node):
        return None
    epsilon, floor, total = guarded(values, divisor)
    power = _power(values, total, source)
    ours, theirs = tensor(node), tensor(argument(node, 1, "other"))
    if power is None or ours is None or theirs is None or ours.dim() != theirs.dim():
        return None
    return Normalise(power=power, epsilon=epsilon, floor=floor), source


def guarded(values: Values, divisor: Node) -> tuple[float, float, Node]:
    """Read what keeps a divisor from being zero: `+ eps`, or a least value."""
    name, inner = plain_name(divisor), values.plain_operand(divisor, 0)
    second = argument(divisor, 1, "other" if name == "add" else "min")
    if isinstance(inner, Node) and is_constant(second):
        if name == "add":
            return float(second), 0.0, inner
        if name in ("clamp", "clamp_min") and argument(divisor, 2, "max") is None:
            return 0.0, float(second), inner
    return 0.0, 0.0, divisor


def _power(values: Values, total: Node, of: Node) -> float | None:
    """Tell which norm over the last dimension of `of` a node is; None if it is none."""
    name = plain_name(total)
    if values.plain_operand(total, 0) is not of:
        return None
    if name == "sum" and is_last(argument(total, 1, "dim"), of):
        return 1.0
    dim = argument(total, 2, "dim")
    if name in ("norm", "vector_norm", "linalg_vector_norm") and is_last(dim, of):
        power = argument(total, 1, "p" if name == "norm" else "ord", 2)
        return float(power) if is_constant(power) else None
    return None


def read_log_softmax(values: Values, node: Node) -> Read | None:
    """Read `(x - x.logsumexp(-1, keepdim=True)).exp()` as the softmax that it is."""
    inner = values.plain_operand(node, 0)
    if plain_name(node) != "exp" or not isinstance(inner, Node) or plain_name(inner) != "sub":
        return None
    source, total = values.plain_operand(inner, 0), values.plain_operand(inner, 1, "other")
    if not isinstance(source, Node) or not isinstance(total, Node):
        return None
    runs = plain_name(total) == "logsumexp" and is_last(argument(total, 1, "dim"), source)
    if not runs or values.plain_operand(total, 0) is not source:
        return None
    return Function("softmax"), source


def read_part(values: Values, node: Node) -> Read | None:
    """Read a slice of the last dimension."""
    source, part = values.operand(node, 0), last_part(node)
    every, count = width(source), width(node)
    if part is None or every is None or count is None:
        return None
    start, _, stride = part.indices(every)
    return (Part(start, count, every), source) if stride == 1 else None

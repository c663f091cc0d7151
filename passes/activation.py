"""Read the activation between an expert's two products from the graph.

Walks back from the second product's input to the first product's output, and writes down what it
meets as an expression over `gate` and `up` (or `x`). Gate and up are the halves of one product, or
two products of their own. A parameter in between is `learned`, a vector of each expert's own.
Changes of dtype are left out: kernels compute activations in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from moecc.codegen.activation import GATE, LEARNED, OPERATIONS, UP, Expr, X, apply, constant
from moecc.passes.axes import over_own_axes, tensor_of, through_layout
from moecc.passes.parameters import GIVEN, is_parameter, stacked_parameters
from moecc.passes.pattern import is_cast, mutates, op_name
from moecc.passes.products.contraction import PRODUCTS
from moecc.passes.sizes import fixed

_PLAIN = {
    "abs": "abs", "add": "add", "div": "div", "exp": "exp", "maximum": "max", "minimum": "min",
    "mul": "mul", "multiply": "mul", "neg": "neg", "relu": "relu", "sigmoid": "sigmoid",
    "silu": "silu", "square": "square", "sub": "sub", "subtract": "sub", "swish": "silu",
    "tanh": "tanh", "truediv": "div",
}  # fmt: skip


class UnreadableActivation(Exception):
    """The graph between the products holds something that kernels cannot compute."""

    def __init__(self, node: Node | None, why: str) -> None:
        super().__init__(f"at {node.name}, {why}" if node else why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What was read."""

    expr: Expr
    rows: Node
    """The first product's output; the gate's, if gate and up are two products."""
    up_rows: Node | None
    """The up product's output, if it is one of its own."""
    learned: Node | None = None
    """The parameter that it reads."""
    gated: bool
    interleaved: bool
    nodes: tuple[Node, ...]
    """Every node between the products."""


def read_activation(activated: Node) -> Activation:
    """Read back from the second product's input; reads no parameters.

    Raises `UnreadableActivation` naming the node that stopped it.
    """
    activation = read_with_learned(activated)
    if activation.learned is not None:
        why = "it reads a parameter, which is known of dispatched buffers only"
        raise UnreadableActivation(activation.learned, why)
    return activation


def read_with_learned(activated: Node) -> Activation:
    """Read back from the second product's input, over a parameter too.

    Raises `UnreadableActivation` naming the node that stopped it.
    """
    reader = _Reader()
    expr = reader.read(activated)
    rows, gated = [*reader.rows], len(reader.rows) == 2
    if (
        not 1 <= len(rows) <= 2
        or len(reader.layouts) != 1
        or (gated and "plain" not in reader.layouts)
    ):
        found = ", ".join(f"{node.name} ({op_name(node)})" for node in reader.rows)
        raise UnreadableActivation(
            activated,
            f"it is not elementwise in a gate and an up, or in one product: it reads {found}",
        )
    if len(reader.learned) > 1:
        raise UnreadableActivation(activated, "it reads several parameters")
    (layout,) = reader.layouts
    if gated:
        rows = sorted(rows, key=lambda node: not _in_unary(expr, _own_leaf(node)))
    names = (GATE, UP) if gated else (X,)
    leaves = {_own_leaf(node): leaf for node, leaf in zip(rows, names, strict=True)}
    return Activation(
        expr=substitute(expr, leaves),
        rows=rows[0],
        up_rows=rows[1] if gated else None,
        learned=next(iter(reader.learned), None),
        gated=gated or layout != "plain",
        interleaved=layout == "interleaved",
        nodes=tuple(reader.interior),
    )


def substitute(expr: Expr, leaves: Mapping[Expr, Expr]) -> Expr:
    """Put other leaves in the place of some."""
    if expr.args:
        return Expr(expr.op, tuple(substitute(arg, leaves) for arg in expr.args))
    return leaves.get(expr, expr)


def _own_leaf(rows: Node) -> Expr:
    """Stand for a product until it is known whether it is the gate, the up or the only one."""
    return Expr(f"rows of {rows.name}")


def _in_unary(expr: Expr, leaf: Expr) -> bool:
    """Tell whether a leaf goes through a function of its own, as a gate does."""
    below = any(_in_unary(arg, leaf) for arg in expr.args)
    return below or (len(expr.args) == 1 and leaf in _all_leaves(expr))


def _all_leaves(expr: Expr) -> set[Expr]:
    return set[Expr]().union(*map(_all_leaves, expr.args)) if expr.args else {expr}


class _Reader:
    def __init__(self) -> None:
        self.rows: dict[Node, None] = {}
        self.layouts: set[str] = set()
        self.learned: dict[Node, None] = {}
        self.interior: dict[Node, None] = {}
        self._known: dict[Node, Expr] = {}

    def read(self, value: Any) -> Expr:
        """Turn a node or a number into an expression."""
        if isinstance(value, (int, float)):
            return constant(value)
        if value not in self._known:
            self.interior[value] = None
            self._known[value] = self._read_node(value)
        return self._known[value]

    def _leaf(self, rows: Node, layout: str, leaf: Expr) -> Expr:
        self.interior.pop(rows, None)
        self.rows[rows] = None
        self.layouts.add(layout)
        return leaf

    def _read_node(self, node: Node) -> Expr:
        name = op_name(node)
        args = cast(tuple[Any, ...], node.args)
        operation = _PLAIN.get(name, "")
        if (number := fixed(node.meta.get("example_value"))) is not None:
            self.interior.pop(node, None)
            return constant(number)
        if _is_biased_product(node):
            return self._leaf(node, "plain", _own_leaf(node))
        origin = _origin(node)
        if is_parameter(origin) or stacked_parameters(origin):
            self.interior.pop(node, None)
            self.learned[node] = None
            return LEARNED
        if mutates(node):
            raise UnreadableActivation(node, f"{name} writes in place")
        plain = all(given is None or given is False for given in node.kwargs.values())
        if plain and OPERATIONS.get(operation) == len(args):
            return apply(operation, *(self.read(arg) for arg in args))
        if is_cast(node):
            return self.read(args[0])
        if name == "getitem":
            return self._read_half(node)
        if name == "gelu":
            form = node.kwargs.get("approximate", (*args, "none")[1])
            return apply("gelu_tanh" if form == "tanh" else "gelu", self.read(args[0]))
        if name in ("clamp", "clip", "clamp_min", "clamp_max"):
            return self._read_clamp(node, name)
        if name == "pow" and args[1] == 2:
            return apply("square", self.read(args[0]))
        if name == "tensor" and isinstance(args[0], float) and _is_floating(node):
            return constant(args[0])
        return self._leaf(node, "plain", _own_leaf(node))  # the product itself, or a stranger

    def _read_clamp(self, node: Node, name: str) -> Expr:
        first = node.args[1] if len(node.args) > 1 else None
        second = node.args[2] if len(node.args) > 2 else None
        low = node.kwargs.get("min", None if name == "clamp_max" else first)
        high = node.kwargs.get("max", first if name == "clamp_max" else second)
        result = self.read(cast(Any, node.args)[0])
        result = result if low is None else apply("max", result, self.read(low))
        return result if high is None else apply("min", result, self.read(high))

    def _read_half(self, node: Node) -> Expr:
        """Recognise one half of the rows: `chunk(2, -1)[i]`, `split(I, -1)[i]` or a slice."""
        source, index = node.args
        if isinstance(source, Node) and op_name(source) in ("chunk", "split", "tensor_split"):
            if _last_dim_halves(source) and index in (0, 1):
                self.interior[source] = None
                return self._leaf(
                    cast(Node, source.args[0]), "halves", (GATE, UP)[cast(int, index)]
                )
            raise UnreadableActivation(source, "it does not split the last dimension in two")
        if isinstance(source, Node) and _whole_but_last(index, source):
            width = _width(source)
            match cast(tuple[Any, ...], index)[-1]:
                case slice(start=None | 0, stop=None, step=2):
                    return self._leaf(source, "interleaved", GATE)
                case slice(start=1, stop=None, step=2):
                    return self._leaf(source, "interleaved", UP)
                case one if one == slice(None, width // 2) and width % 2 == 0:
                    return self._leaf(source, "halves", GATE)
                case one if one == slice(width // 2, None) and width % 2 == 0:
                    return self._leaf(source, "halves", UP)
                case _:
                    pass
        raise UnreadableActivation(node, "it takes neither half of a product")


def _is_biased_product(node: Node) -> bool:
    """Tell a product plus a parameter, or rows chosen from one, from any other sum."""
    if op_name(node) not in ("add", "iadd") or len(node.args) != 2:
        return False
    if not all(tensor_of(arg) is not None for arg in node.args):
        return False
    one, other = (_origin(cast(Node, arg)) for arg in node.args)
    bias = other if op_name(one) in PRODUCTS else one
    if op_name(bias) == "getitem" and tensor_of(bias.args[0]) is not None:
        bias = _origin(cast(Node, bias.args[0]))
    products = sum(op_name(part) in PRODUCTS for part in (one, other))
    return products == 1 and (bias.op in GIVEN or bool(stacked_parameters(bias)))


def _origin(node: Node) -> Node:
    """Go back through what only changes layout or dtype."""
    view = over_own_axes(node)
    while (before := through_layout(view)) is not None:
        view = before
    return view.node


def _whole_but_last(index: Any, source: Node) -> bool:
    """Tell whether an index takes everything of every dimension but the last."""
    if not isinstance(index, tuple) or len(cast(tuple[Any, ...], index)) < 2:
        return False
    *before, _ = cast(tuple[Any, ...], index)
    full = all(one is Ellipsis or one == slice(None) for one in before)
    return full and (Ellipsis in before or len(before) + 1 == source.meta["example_value"].dim())


def _is_floating(node: Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.is_floating_point()


def _width(node: Node) -> int:
    return int(node.meta["example_value"].shape[-1])


def _last_dim_halves(split: Node) -> bool:
    source, parts = split.args[:2]
    dim = split.kwargs.get("dim", split.args[2] if len(split.args) > 2 else 0)
    if not isinstance(source, Node) or dim not in (-1, source.meta["example_value"].dim() - 1):
        return False
    width = _width(source)
    if op_name(split) == "split":
        return parts in (width // 2, [width // 2] * 2, (width // 2,) * 2)
    return bool(parts == 2) and width % 2 == 0

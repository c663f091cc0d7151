"""Read the matrix products in a recording: which part of which parameter multiplies what."""

from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from moecc.observe.recorder import Slice
from moecc.passes.pattern import is_cast, op_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A weight as it lies in a parameter."""

    path: str
    offset: int
    """In elements from the parameter's first."""
    inputs: int
    outputs: int
    turned: bool
    """It lies as [inputs, outputs]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One `rows @ weight.T + bias`, however it was written."""

    node: Node
    rows: Node
    weight: Matrix
    bias: Slice | None


def read_product(node: Node) -> Product | None:
    """Read `F.linear`, `x @ W` or `torch.addmm` with parts of parameters; None for all else."""
    name, args = op_name(node), cast(list[Any], [*node.args])
    if name == "linear":
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        rows, weight = args[0], _matrix(args[1], outputs_first=True)
    elif name in ("matmul", "mm", "__matmul__"):
        (rows, right), bias = args, None
        weight = _matrix(right, outputs_first=False)
    elif name == "addmm":
        bias, rows, right = args[:3]
        weight = _matrix(right, outputs_first=False)
    else:
        return None
    if weight is None or not isinstance(rows, Node):
        return None
    part = bias.meta.get("slice") if isinstance(bias, Node) else None
    if bias is not None and (part is None or len(part.shape) != 1 or part.strides != (1,)):
        return None
    return Product(node=node, rows=rows, weight=weight, bias=part)


def _matrix(node: Any, outputs_first: bool) -> Matrix | None:
    part: Slice | None = node.meta.get("slice") if isinstance(node, Node) else None
    if part is None or len(part.shape) != 2:
        return None
    outputs, inputs = part.shape if outputs_first else part.shape[::-1]
    strides = part.strides if outputs_first else part.strides[::-1]
    if strides not in ((inputs, 1), (1, outputs)):
        return None
    turned = strides != (inputs, 1)
    return Matrix(path=part.path, offset=part.offset, inputs=inputs, outputs=outputs, turned=turned)


def products_before(node: Node) -> list[Product]:
    """Find the products that a value is computed from, in the order of the code."""
    waiting, seen = [node], set[Node]()
    found: list[Product] = []
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        product = read_product(one)
        if product is None:
            waiting += one.all_input_nodes
        else:
            found.append(product)
    order = {one: number for number, one in enumerate(node.graph.nodes)}
    return sorted(found, key=lambda product: order[product.node])


def through(node: Node) -> Node:
    """Look through what gives its input back in eval mode."""
    while True:
        keeps = op_name(node) in ("dropout", "feature_dropout") and not _drops(node)
        if not keeps and not is_cast(node) and op_name(node) not in ("clone", "detach"):
            return node
        node = cast(Node, node.args[0])


def _drops(node: Node) -> bool:
    names = ("input", "p", "training")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return bool(given.get("training", True)) and given.get("p", 0.5) != 0

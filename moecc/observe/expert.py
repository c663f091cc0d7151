"""Read what one expert computes: two matrix products and an activation between them.

down(act(gate(x), up(x)))      down(act(chunk(gate_up(x))))      down(act(up(x)))
"""

import operator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

from moecc.codegen.activation import Expr
from moecc.observe.products import Matrix, Product, products_before, read_product, through
from moecc.observe.recorder import Recorder, Slice
from moecc.observe.unrecordable import Unrecordable
from moecc.passes.activation import Activation, UnreadableActivation, read_activation
from moecc.passes.pattern import op_name

_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One expert, its weights as parts of parameters."""

    first: tuple[Matrix, ...]
    """The first product: gate and up, or one for both, or up alone."""
    second: Matrix
    first_bias: tuple[Slice, ...]
    """As many as `first`, or none."""
    second_bias: Slice | None
    activation: Expr
    gated: bool
    interleaved: bool
    dtype: torch.dtype

    @property
    def hidden(self) -> int:
        """H."""
        return self.second.outputs

    @property
    def intermediate(self) -> int:
        """I."""
        return self.second.inputs


def read_module(module: nn.Module) -> Expert:
    """Run an expert that is a module on a few rows and read it.

    Raises `Unrecordable` saying what is not like an expert.
    """
    weight = next((p for p in module.parameters() if p.dim() == 2), None)
    if weight is None or weight.is_meta or not weight.is_floating_point():
        raise Unrecordable("it has no weight matrix with data")
    refused = Unrecordable("its weight has no inputs")
    for width in dict.fromkeys(weight.shape[::-1]):  # [outputs, inputs], or [inputs, outputs]
        try:
            return _run_and_read(module, weight, width)
        except Unrecordable as error:
            refused = error
        except Exception as error:  # a width that does not fit, or whatever else the code raises
            refused = Unrecordable(f"it does not run on {width} numbers a row: {error}")
    raise refused


def _run_and_read(module: nn.Module, weight: torch.Tensor, width: int) -> Expert:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, width, generator=generator).to(weight)
    recorder = Recorder(module, [x])
    with recorder, torch.no_grad():
        out = module(x)
    if not isinstance(out, torch.Tensor) or out.shape != x.shape:
        raise Unrecordable("its result does not have the shape of its input")
    down = read_product(through(recorder.node_of(out)))
    if down is None:
        raise Unrecordable("its result is not a matrix product")
    expert, rows = read_expert(down)
    if rows.op != "placeholder":
        raise Unrecordable("its products do not read its input as it is")
    return expert


def read_expert(down: Product) -> tuple[Expert, Node]:
    """Read back from an expert's second product; give the rows it is computed from, too.

    Raises `Unrecordable`.
    """
    products = products_before(down.rows)
    sources = {through(product.rows) for product in products}
    if not 1 <= len(products) <= 2 or len(sources) != 1:
        raise Unrecordable(f"its result comes from {len(products)} products of its input")
    if len({(one.bias is None, one.weight.turned) for one in products}) > 1:
        raise Unrecordable("its gate and its up are not stored alike")
    activation = _activation(down.rows, products)
    expert = Expert(
        first=tuple(product.weight for product in products),
        second=down.weight,
        first_bias=tuple(product.bias for product in products if product.bias is not None),
        second_bias=down.bias,
        activation=activation.expr,
        gated=activation.gated,
        interleaved=activation.interleaved,
        dtype=down.node.meta["example_value"].dtype,
    )
    rows = expert.intermediate * (2 if expert.gated and len(products) == 1 else 1)
    if any((one.inputs, one.outputs) != (expert.hidden, rows) for one in expert.first):
        raise Unrecordable("its products do not chain back to its input's width")
    return expert, sources.pop()


def two_halves() -> torch.Tensor:
    """Stand in a recording for the results of gate and up side by side."""
    raise NotImplementedError("a recording is not run before its experts are replaced")


def _activation(activated: Node, products: list[Product]) -> Activation:
    """Read the activation; with two products, as if they were the halves of one."""
    graph = activated.graph
    try:
        if len(products) == 1:
            return _from(products[0].node, read_activation(through(activated)))
        parts = [product.node.meta["example_value"] for product in products]
        with graph.inserting_after(products[0].node):
            halves = graph.call_function(operator.getitem, ())  # placed first, filled in below
        with graph.inserting_before(halves):
            merged = graph.call_function(two_halves)
            merged.meta["example_value"] = torch.cat(parts, dim=-1)
            split = graph.call_method("chunk", (merged, 2, -1))
            for number, product in enumerate(products):
                half = graph.call_function(operator.getitem, (split, number))
                half.meta["example_value"] = parts[number]
                product.node.replace_all_uses_with(half)
        graph.erase_node(halves)
        return _from(merged, read_activation(through(activated)))
    except UnreadableActivation as error:
        raise Unrecordable(f"its activation cannot be read: {error}") from error


def _from(rows: Node, activation: Activation) -> Activation:
    """Hold an activation to start at the first product, with nothing but casts before it."""
    if through(activation.rows) is not rows:
        raise Unrecordable(f"before its activation it calls {op_name(activation.rows)}")
    return activation

"""Find what is dispatched, computed by experts and combined, whatever it is written with.

combine  [T, E, C]   terms = experts(slots)   slots = dispatch [T, E, C] x hidden [T, H]
"""

from itertools import permutations

import torch
from torch.fx import Node

from moecc.passes.activation import Activation, UnreadableActivation, read_with_learned
from moecc.passes.axes import (
    Axis,
    Bound,
    Dim,
    View,
    broadcast,
    contracted,
    leaves,
    over_own_axes,
    shape_of,
    size_along,
    tensor_of,
    through_layout,
)
from moecc.passes.capacity.apart import is_apart, read_together
from moecc.passes.capacity.dataflow import Dataflow, Unproven
from moecc.passes.capacity.experts import Product, operands_of, product_of, vector_of
from moecc.passes.capacity.routes import Dispatch, routes_of
from moecc.passes.capacity.terms import Reader
from moecc.passes.found import Found, NearMiss
from moecc.passes.ir import Route
from moecc.passes.parameters import is_parameter
from moecc.passes.pattern import op_name
from moecc.passes.products.contraction import PRODUCTS
from moecc.passes.sizes import same

_SIZES = (int, torch.SymInt, torch.Size)
_COUNTS = {"cumsum"}
_PICKS = {"one_hot", "topk", "argmax", "scatter", "scatter_"}
_CHOICES = _PICKS | _COUNTS
"""What shows that tokens choose among experts: a soft mixture has none of these."""


def find_dispatched(output: Node) -> Found | None:
    """Find the block that ends at a node; None if it is far from one.

    Raises `NearMiss` if the experts are there, and are given what cannot be shown to be tokens.
    """
    bound: Bound = {}
    out = over_own_axes(output)
    operands = contracted(out, bound) if len(shape_of(output)) > 1 else None
    for combine, terms in permutations(operands or (), 2):
        counted = not is_parameter(combine.node) and _is_counted(combine.node)
        if apart := counted and is_apart(terms):
            together = read_together(terms, output)
            terms, calls = together.terms, together.nodes
        else:
            calls = ()
        second = product_of(terms, out.dims[-1][0], bound)
        found = second and _between(out, combine, second, calls, bound)
        if found:
            return found
        if apart:
            why = "its experts are called one by one, and are no two products on dispatched tokens"
            raise NearMiss(output, why)
        if counted and not second and (shape := _matrices_of(terms, bound)):
            raise NearMiss(output, f"its experts' matrices are {shape}, not [E, ., .]")
    return None


def _is_counted(combine: Node) -> bool:
    """Tell whether tokens choose, and have places in buffers."""
    return _made_of(combine, _COUNTS) and _made_of(combine, _PICKS)


def _matrices_of(terms: View, bound: Bound) -> str:
    """Give the shape of a parameter of groups of matrices in a product, if there is one."""
    read = operands_of(terms, bound)
    views = read[0] if read is not None else tuple[View]()
    shapes = [shape_of(view.node) for view in views if is_parameter(view.node)]
    shapes = [shape for shape in shapes if len(shape) > 3]
    return f"[{', '.join(map(str, shapes[0]))}]" if shapes else ""


def _between(
    out: View, combine: View, second: Product, calls: tuple[Node, ...], bound: Bound
) -> Found | None:
    """Go on from the second product to the tokens; `calls` are those of experts one by one."""
    activated, path = second.rows, [*second.path, *calls]
    while (below := through_layout(activated)) is not None:
        path.append(activated.node)
        activated = below
    try:
        activation = read_with_learned(activated.node)
    except UnreadableActivation as error:
        if not _made_of(combine.node, _CHOICES):
            return None
        why = f"the activation is not one that kernels compute: {error}"
        raise NearMiss(out.node, why, second.matrices) from error
    first = _first(activation.rows, activated, bound)
    up = _first(activation.up_rows, activated, bound) if activation.up_rows else None
    entered = first and operands_of(first.rows, bound)
    if not first or not entered or first.expert is not second.expert:
        return None
    if activation.up_rows:
        _check_up(out.node, first, up)
    learned = _learned(activation, activated, second)
    operands, inside = entered
    path += (*activation.nodes, *first.path, *(up.path if up else ()), *inside)
    for dispatch, hidden in permutations(operands):
        block = _dispatch(out, combine, (dispatch, hidden), inside[-1], first)
        if block:
            products = (first, up, second)
            return _found(out.node, hidden.node, block, products, activation, learned, path)
    return None


def _learned(activation: Activation, activated: View, second: Product) -> Node | None:
    """Give the vectors [E, I] that the activation reads."""
    if activation.learned is None:
        return None
    view, inner = broadcast(activation.learned, activated.dims), leaves(activated.dims[-1])
    found = view and len(inner) == 1 and vector_of(view, second.expert, inner[0])
    if not found:
        why = "what its activation reads is not a vector of each expert's own"
        raise NearMiss(activation.learned, why, second.matrices)
    return found


def _found(
    output: Node,
    hidden: Node,
    block: Dispatch,
    products: tuple[Product, Product | None, Product],
    activation: Activation,
    learned: Node | None,
    path: list[Node],
) -> Found:
    first, up, second = products
    _check_dtypes(path, hidden, second.matrices)
    routes = _routes(block, output, second.matrices)
    nodes = {node.name: node for node in output.graph.nodes}
    first_factor = routes[0].factors[0].node if routes[0].factors else routes[0].ids.node
    parts = set(path) - {output}
    work = {node for node in parts if through_layout(over_own_axes(node)) is None}
    return Found(
        hidden=hidden,
        ids=nodes[routes[0].ids.node],
        weights=nodes[first_factor],
        routes=routes,
        gate_up=first.matrices,
        up=up.matrices if up else None,
        down=second.matrices,
        gate_up_bias=first.bias,
        up_bias=up.bias if up else None,
        down_bias=second.bias,
        learned=learned,
        output=output,
        active=sum(route.active for route in routes),
        activation=activation.expr,
        gated=activation.gated,
        interleaved=activation.interleaved,
        transposed=first.input_major,
        down_transposed=second.input_major,
        work=frozenset(work),
        aids=frozenset(parts - work) | _measures(parts),
    )


def _routes(block: Dispatch, output: Node, matrices: Node) -> tuple[Route, ...]:
    try:
        return routes_of(Reader(Dataflow(output.graph)), block, output)
    except Unproven as stop:
        why = f"a slot of its buffers may hold several tokens: at {stop.node.name}, {stop.why}"
        sparse = _made_of(block.combine.node, _CHOICES)
        raise NearMiss(output, why, matrices, fallback=sparse) from stop


def _measures(parts: set[Node]) -> frozenset[Node]:
    """Give what only asks for the shape of a part, to give it to another one."""
    asking, left = set[Node](), list(parts)
    while left:
        users = left.pop().users
        new = {one for one in users if isinstance(one.meta.get("example_value"), _SIZES)} - asking
        asking |= new
        left += new
    while strange := {one for one in asking if not (asking | parts).issuperset(one.users)}:
        asking -= strange
    return frozenset(asking)


def _check_dtypes(path: list[Node], hidden: Node, matrices: Node) -> None:
    """Raise `NearMiss` if the model rounds somewhere to less than what its matrices are."""
    wide = matrices.meta["example_value"].dtype
    for node in (*path, hidden):
        value = tensor_of(node)
        if value is not None and value.dtype.itemsize < wide.itemsize:
            raise NearMiss(node, f"{node.name} is rounded to {value.dtype}", matrices)


def _made_of(combine: Node, names: set[str]) -> bool:
    """Tell whether any of some calls lies between the router and a combine tensor.

    What comes from another graph may be made of anything.
    """
    seen, left = set[Node](), [combine]
    while left:
        node = left.pop()
        if op_name(node) in names or (node is combine and node.op == "placeholder"):
            return True
        routes = op_name(node) in PRODUCTS and any(
            source.op in ("placeholder", "get_attr") for source in node.all_input_nodes
        )
        if node not in seen and not routes:
            seen.add(node)
            left += node.all_input_nodes
    return False


def _first(rows: Node, activated: View, bound: Bound) -> Product | None:
    """Read a first product, whose rows are those of the activation."""
    shape, other = shape_of(rows), shape_of(activated.node)
    if len(shape) != len(other) or not all(map(same, shape[:-1], other[:-1])):
        return None
    width = Axis(shape[-1])
    return product_of(View(rows, (*activated.dims[:-1], (width,))), width, bound)


def _check_up(output: Node, gate: Product, up: Product | None) -> None:
    """Raise `NearMiss` unless gate and up are products of the same rows, laid out alike."""
    if up is None or gate.rows.node is not up.rows.node or _slots(gate) != _slots(up):
        raise NearMiss(output, "gate and up are products of different rows", gate.matrices)
    if gate.input_major != up.input_major:
        why = "gate and up store their matrices in different layouts"
        raise NearMiss(output, why, gate.matrices)


def _slots(product: Product) -> list[Dim]:
    return [leaves(dim) for dim in product.rows.dims[:-1]]


def _dispatch(
    out: View, combine: View, operands: tuple[View, View], entry: Node, first: Product
) -> Dispatch | None:
    """See both tensors over the same tokens, experts and slots, if that is what they are over."""
    dispatch, hidden = operands
    features = leaves(first.rows.dims[-1])
    if leaves(hidden.dims[-1]) != features or dispatch.axes.intersection(features):
        return None
    if not same(size_along(features), size_along(out.dims[-1])) or not _unite(hidden, out):
        return None
    tokens = leaves(axis for dim in out.dims[:-1] for axis in dim)
    experts = (first.expert,)
    slots = tuple(first.rows.axes.difference(features, experts))
    over = frozenset((*tokens, *experts, *slots))
    if combine.axes != over or not dispatch.axes <= over:
        return None
    return Dispatch(
        dispatch=dispatch,
        entry=entry,
        combine=combine,
        tokens=tokens,
        expert=experts,
        slots=slots,
    )


def _unite(hidden: View, out: View) -> bool:
    """Take the tokens that go in for those that come out, in their order."""
    going, coming = (leaves(a for dim in view.dims[:-1] for a in dim) for view in (hidden, out))
    pairs = list(zip(going, coming, strict=False))
    if len(going) == 1 or len(coming) == 1:
        one, others = (going[0], coming) if len(going) == 1 else (coming[0], going)
        if not same(one.size, size_along(others)):
            return False
        if one not in others:
            one.parts = others
        return True
    if len(going) != len(coming) or not all(same(one.size, two.size) for one, two in pairs):
        return False
    for one, two in pairs:
        if one is not two:
            one.parts = (two,)
    return True

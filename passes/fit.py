"""Check that a block is one that kernels compute, and that one call can take its place."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.multiprocessing.reductions import StorageWeakRef

from moecc.passes.axes import shape_of, tensor_of
from moecc.passes.found import Found
from moecc.passes.pattern import FLOATS, mutates, op_name
from moecc.passes.sizes import same, same_shape


def misfit(found: Found) -> str:
    """Say why the block cannot be fused; nothing if it can."""
    return _matrices(found) or _shapes(found) or _biases(found) or _stranger(found)


def _matrices(found: Found) -> str:
    """Check type, dtype and memory layout of the experts' matrices."""
    given = {"gate_up": found.gate_up, "up": found.up, "down": found.down}
    nodes = {name: node for name, node in given.items() if node is not None}
    for name, node in nodes.items():
        argument = node.meta.get("grapharg")
        value: Any = tensor_of(node) if argument is None else argument.example
        if type(value) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
            return f"expert weights are {type(value).__name__}, which moecc does not read"
        if value.stride(-1) != 1:
            return f"{name} has strides {value.stride()}; kernels read rows, so call .contiguous()"
    dtypes = {_value(node).dtype for node in nodes.values()}
    if len(dtypes) > 1 or not dtypes.issubset(FLOATS):
        return f"expert weights are {sorted(map(str, dtypes))}, not one floating-point dtype"
    if type(_value(found.hidden)) is not FakeTensor:
        return "the block is inside a transformation such as vmap"
    return ""


def _shapes(found: Found) -> str:
    """Check that tokens enter the first product, its rows the second, and tokens leave it."""
    hidden, first, second = (shape_of(one) for one in (found.hidden, found.gate_up, found.down))
    if found.transposed:
        first = first[0], first[2], first[1]
    if found.down_transposed:
        second = second[0], second[2], second[1]
    rows = second[2] if found.up is not None or not found.gated else 2 * second[2]
    chained = same(first[1], rows) and same(first[2], hidden[-1]) and same(second[1], hidden[-1])
    alike = found.up is None or same_shape(shape_of(found.up), shape_of(found.gate_up))
    if not chained or not alike or not same(first[0], second[0]):
        shapes = [[*map(str, one)] for one in (hidden, first, second)]
        return f"weights [E, ., .] do not chain back to the hidden size: {shapes}"
    if not all(size.is_Integer for size in (*first, *second)):
        return "the sizes of the expert weights change from call to call"
    return ""


def _biases(found: Found) -> str:
    if (found.gate_up_bias is None) != (found.down_bias is None):
        return "only one of the two products has a bias"
    experts, *sides = shape_of(found.down)
    outer, inner = sides[::-1] if found.down_transposed else sides
    rows = 2 * inner if found.gated and found.up_bias is None else inner
    for node, width in (
        (found.gate_up_bias, rows),
        (found.up_bias, inner),
        (found.down_bias, outer),
        (found.learned, inner),
    ):
        if node is None:
            continue
        bias, dtype = _value(node), _value(found.down).dtype
        shape = [size for size in shape_of(node) if size != 1]
        if bias.dtype != dtype or not same_shape(shape, (experts, width)):
            return f"{node.name} is {bias.dtype} {tuple(bias.shape)}, not {dtype} [E, {width}]"
    return ""


def _stranger(found: Found) -> str:
    """Find a value inside of the block that somebody else needs."""
    ours = {*found.work, *found.aids, found.output}
    computed = set(found.work)
    for node in sorted(found.aids):
        if not computed.isdisjoint(node.all_input_nodes):
            computed.add(node)
    for node in sorted(computed):
        if stranger := next((user for user in node.users if user not in ours), None):
            return f"{node.name}, in the middle of the block, is used by {stranger.name} too"
    return ""


def interior(found: Found) -> frozenset[Node]:
    """Give the nodes that nobody needs any more once the block is one call."""
    left = {*found.work, *found.aids} - _needed(found)
    while True:
        stay = {node for node in left if not _only_serves(node, {*left, found.output})}
        if not stay:
            return frozenset(left)
        left -= stay


def _only_serves(node: Node, others: set[Node]) -> bool:
    writes_elsewhere = mutates(node) and node.args[0] not in others
    return others.issuperset(node.users) and not writes_elsewhere


def _needed(found: Found) -> set[Node]:
    """Collect what the block's inputs are made of."""
    waiting = {found.hidden, found.ids, found.weights, found.onto}
    ours, needed = {*found.work, *found.aids}, set[Node]()
    while waiting:
        node = waiting.pop()
        if node in ours and node not in needed:
            needed.add(node)
            waiting.update(node.all_input_nodes)
    return needed


class Memory:
    """Which nodes share memory, and who writes to it."""

    def __init__(self, graph: Graph) -> None:
        self._nodes: dict[StorageWeakRef, set[Node]] = {}
        for node in graph.nodes:
            for memory in _memory(node):
                self._nodes.setdefault(memory, set()).add(node)

    def write(self, found: Found) -> str:
        """Find a write in place that would be lost, or come before what it came after."""
        inside = interior(found)
        for node in filter(mutates, inside):
            for memory in _written(node):
                if seen := next(iter(self._nodes[memory] - inside), None):
                    return f"{node.name} changes {seen.name} in place in the middle of the block"
        every = {*found.work, *found.aids, *found.rests_on, found.output}
        ours = {node for node in every if node is found.output or node < found.output}
        node, read = min(ours), set[StorageWeakRef]()
        while node is not found.output:
            if node in ours:
                read.update(_memory_of([node, *node.all_input_nodes]))
            elif mutates(node) and not read.isdisjoint(_written(node)):
                return f"{node.name} changes {node.args[0]} in place in the middle of the block"
            node = node.next
        return ""


def _memory_of(nodes: Sequence[Node]) -> Iterator[StorageWeakRef]:
    """Give the memory that is read with these nodes; of several results, getitem reads one."""
    return (memory for node in nodes if tensor_of(node) is not None for memory in _memory(node))


def _memory(node: Any) -> Iterator[StorageWeakRef]:
    """Give the memory of a node's tensors."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    several = cast(Sequence[Any], value if isinstance(value, (tuple, list)) else (value,))
    for one in several:
        if isinstance(one, torch.Tensor):
            while is_functorch_wrapped_tensor(one):  # under vmap: the memory is its inner tensor's
                one = get_unwrapped(one)
            yield StorageWeakRef(one.untyped_storage())


def _written(node: Node) -> list[StorageWeakRef]:
    """Give the memory that a node which mutates may write to."""
    name = op_name(node)
    first = name.endswith("_") or name.startswith("i") or name == "setitem"
    sources = node.args[:1] if first and "out" not in node.kwargs else node.all_input_nodes
    return [memory for source in sources for memory in _memory(source)]


def _value(node: Node) -> torch.Tensor:
    return node.meta["example_value"]

"""Say what a node of a Dynamo graph holds at the moment when another node reads it.

Dynamo graphs are not functional: after `mask.scatter_(1, ids, 1)` everyone who reads `mask` reads
what was scattered. A write of the whole tensor is followed; one through a view is not read.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard, cast

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx import Graph, Node

from moecc.passes.pattern import mutates, op_name
from moecc.passes.sizes import fixed, known

_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
}  # fmt: skip
_TURNS = {"t", "transpose", "swapaxes", "permute", "expand", "getattr", "select", "narrow"}
_PARTS = {"chunk", "split", "tensor_split", "unbind"}
_CASTS = {
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "long", "int", "contiguous",
}  # fmt: skip
_LIKE = {"type_as", "view_as", "reshape_as", "expand_as", "zeros_like", "ones_like"}
"""They read only the shape or the dtype of what comes after their first argument."""
_SAME = {"detach", "clone", "alias", "lift_fresh_copy"}
_PLAIN_NAMES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub",
    "clip": "clamp", "concat": "cat", "concatenate": "cat", "logsigmoid": "log_sigmoid",
    "expit": "sigmoid", "special_expit": "sigmoid", "invert": "not", "logical_not": "not",
    "bitwise_not": "not", "take_along_dim": "gather", "greater": "gt", "less": "lt",
    "mm": "matmul", "pow": "power", "special_softmax": "softmax",
}  # fmt: skip


class Unreadable(Exception):
    """Reading stopped at `node`."""

    def __init__(self, node: Node, why: str = "") -> None:
        super().__init__(why)
        self.node = node
        self.why = why


class Values:
    """The values of one graph, in the order in which its nodes run."""

    def __init__(self, graph: Graph) -> None:
        self._place: dict[Node, int] = {}
        self._root: dict[Node, Node] = {}
        self._writes: dict[Node, list[Node]] = {}
        owners: dict[int, Node] = {}
        nodes: list[Node] = list(graph.nodes)
        for place, node in enumerate(nodes):
            self._place[node] = place
            first, storage = node.args[0] if node.args else None, _storage(node)
            root = owners.get(storage, node)
            if isinstance(first, Node) and (mutates(node) or _may_alias(node, first)):
                root = self._root[first]
            self._root[node] = root
            owners.setdefault(storage, root)
            for written in _written(node):
                self._writes.setdefault(self._root[written], []).append(node)

    def at(self, node: Node, reader: Node) -> Node:
        """Give the node whose result `reader` finds in `node`: itself, or its last write.

        Raises `Unreadable` if the last write was to a part of it.
        """
        begin, end = self._place[node], self._place[reader]
        writes = self._writes.get(self._root[node], ())
        between = [write for write in writes if begin < self._place[write] < end]
        if not between:
            return node
        last = between[-1]
        if not last.args or _whole(last.args[0]) is not _whole(node):
            raise Unreadable(last, f"it writes into {node.name} in place")
        return last

    def operand(self, node: Node, index: int, name: str = "input") -> Any:
        """Give an argument, as it is when `node` reads it; None if it is not there."""
        value = argument(node, index, name)
        if not isinstance(value, Node):
            return value
        number = fixed(value.meta.get("example_value"))
        return self.at(value, node) if number is None else number

    def plain(self, value: Node) -> Node:
        """Go back through what changes neither a number nor what the last dimension means."""
        while True:
            source = self.operand(value, 0)
            if not isinstance(source, Node) or not _is_transparent(value, source):
                return value
            value = source

    def plain_operand(self, node: Node, index: int, name: str = "input") -> Any:
        """Give an argument, gone back to where it was computed."""
        value = self.operand(node, index, name)
        return self.plain(value) if isinstance(value, Node) else value

    def cone(self, value: Node, stop: Node | None = None, limit: int = 200) -> Iterator[Node]:
        """Walk what a node is computed from, nearest first, to `stop` or until `limit` are seen."""
        found, seen = [value], {value}
        for node in found:
            yield node
            if len(seen) > limit:
                return
            if node is stop:
                continue
            sources = node.all_input_nodes
            for source in sources[:1] if op_name(node) in _LIKE else sources:
                try:
                    current = self.at(source, node)
                except Unreadable:
                    current = source
                if current not in seen:
                    seen.add(current)
                    found.append(current)


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Give an argument by position or by keyword."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def plain_name(node: Node) -> str:
    """Name what a node computes, in place or not: `div` for truediv, itruediv, div_ and divide."""
    name = op_name(node)
    if not node.op.startswith("call_"):
        return name
    if mutates(node) and name != "setitem":
        name = name.rstrip("_")
        name = name[1:] if name in ("iadd", "isub", "imul", "itruediv") else name
    return _PLAIN_NAMES.get(name, name)


def tensor(value: Any) -> torch.Tensor | None:
    """Give a node's example value, if it is one tensor."""
    found = value.meta.get("example_value") if isinstance(value, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def width(value: Any) -> int | None:
    """Give the size of the last dimension; None if it is not the same in every call."""
    found = tensor(value)
    size: Any = found.shape[-1] if found is not None and found.dim() else None
    return size if size is None or isinstance(size, int) else known(size)


def is_last(dim: Any, value: Any) -> bool:
    """Tell whether `dim` names the last dimension of a node's tensor, and nothing else."""
    found = tensor(value)
    if isinstance(dim, tuple | list):
        dims = cast("list[Any]", dim)
        dim = dims[0] if len(dims) == 1 else None
    return isinstance(dim, int) and found is not None and dim in (-1, found.dim() - 1)


def last_part(node: Node) -> slice | None:
    """Give the slice that `x[..., a:b]` takes of the last dimension, and takes nothing else."""
    source = tensor(node.args[0]) if node.args else None
    index: Any = node.args[1] if plain_name(node) == "getitem" else None
    if source is None or not isinstance(index, tuple):
        return None
    *before, last = cast("tuple[Any, ...]", index)
    full = all(one is Ellipsis or one == slice(None) for one in before)
    reaches = Ellipsis in before or len(before) + 1 == source.dim()
    return cast("slice", last) if full and reaches and isinstance(last, slice) else None


def is_constant(value: Any) -> TypeGuard[int | float]:
    """Tell a number from a node; True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _storage(node: Node) -> int:
    """Tell tensors in the same memory by the same number; views share it in example values too."""
    found = tensor(node)
    while found is not None and is_functorch_wrapped_tensor(found):  # under vmap
        found = get_unwrapped(found)
    if found is None or found.layout is not torch.strided:
        return -id(node)
    return found.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _whole(value: Any) -> Any:
    """Go back through writes to the tensor that they all write."""
    while isinstance(value, Node) and mutates(value) and value.args:
        value = value.args[0]
    return value


def _written(node: Node) -> list[Node]:
    if not mutates(node):
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        given = zip(node.args, schema.arguments, strict=False)
        found = [arg for arg, one in given if one.alias_info and one.alias_info.is_write]
        return [arg for arg in found if isinstance(arg, Node)]
    out = node.kwargs.get("out")
    targets: Any = out or next(iter(node.args), None)
    several = cast("list[Any]", targets if isinstance(targets, tuple | list) else [targets])
    return [target for target in several if isinstance(target, Node)]


def _may_alias(node: Node, source: Node) -> bool:
    name = op_name(node)
    if name in _CASTS:
        before, after = tensor(source), tensor(node)
        return before is None or after is None or before.dtype == after.dtype
    if name == "getitem":  # of several results, each is a tensor of its own unless they are parts
        return tensor(source) is not None or op_name(source) in _PARTS
    return name in _VIEWS or name in _TURNS or name in _PARTS or name == "detach"


def _is_transparent(node: Node, source: Node) -> bool:
    name = op_name(node)
    before, after = tensor(source), tensor(node)
    if before is None or after is None:
        return False
    if name in _CASTS:
        wide = after.dtype in (before.dtype, torch.int32, torch.int64)
        return after.is_floating_point() if before.is_floating_point() else wide
    if name == "dropout":
        return not argument(node, 2, "training", True) or argument(node, 1, "p", 0.5) == 0
    if name in _VIEWS or (name == "getitem" and _adds_dimensions(node)):
        return width(node) is not None and (width(node) == width(source) or _keeps(node, source))
    return name in _SAME


def _keeps(node: Node, source: Node) -> bool:
    """Tell whether a view only adds or drops a last dimension of one."""
    sizes = [list(map(str, one.meta["example_value"].shape)) for one in (source, node)]
    short, long = sorted(sizes, key=len)  # as text: comparing symbols would guard them
    return long == [*short, "1"]


def _adds_dimensions(node: Node) -> bool:
    index = node.args[1]
    every = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
    return all(one is None or one is Ellipsis or one == slice(None) for one in every)

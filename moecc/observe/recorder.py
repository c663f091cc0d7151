"""Record the torch calls of a module's forward as an FX graph, sizes kept symbolic.

The module runs for real, so that any Python works: loops over `.tolist()`, numpy, early returns.
Sizes read from shapes stay linked to their tensors, so the recording holds for other sizes where
the module's own code does. What Python learned from tensor values is listed in `decisions`.
"""

import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from moecc.observe.counts import Count, as_counts, counts_tokens, plain
from moecc.observe.sizes import Size
from moecc.observe.unrecordable import Unrecordable
from moecc.passes.pattern import op_name

PLAIN_PROPERTIES = {
    "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mkldnn",
    "is_mps", "is_nested", "is_quantized", "is_sparse", "is_xpu", "itemsize", "layout", "names",
    "ndim", "requires_grad",
}  # fmt: skip
_PLAIN_METHODS = {
    "__len__", "dim", "dtype", "element_size", "get_device", "has_names", "is_complex",
    "is_contiguous", "is_floating_point", "ndimension", "stride", "storage_offset",
}  # fmt: skip
_DECIDING = {
    "__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose", "equal",
    "is_nonzero", "item", "numpy", "tolist",
}  # fmt: skip
"""Calls by which a tensor's values, or a size that Python then fixes, reach Python."""
_SIZED_BY_VALUES = {"nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "where"}


def after(value: Any, _write: Any) -> Any:
    """Read a value once another name of its memory was written; keeps the order in a recording."""
    return value


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a parameter that a recorded value shows."""

    path: str
    offset: int
    """In elements from the parameter's first."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Recorder(TorchFunctionMode):
    """Everything that torch was asked to do while the mode was on.

    A node's `meta["example_value"]` is a copy of what it gave; `graph` has the inputs as
    placeholders and `module`'s parameters as attributes.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.graph = Graph()
        self.decisions: list[Node] = []
        """Nodes whose values, or a size that depends on them, decided what Python did next."""
        self.paused = False
        self._nodes: dict[int, Node] = {}
        self._alive: list[torch.Tensor] = []  # ids are those of living objects
        self._by_storage: dict[int, list[weakref.ref[torch.Tensor]]] = {}
        tensors = [*module.named_parameters(), *module.named_buffers()]
        self._paths = {id(tensor): path for path, tensor in tensors}
        self._parameters = {
            tensor.untyped_storage().data_ptr(): (path, tensor) for path, tensor in tensors
        }
        self._fixed = set(self._parameters)
        for number, tensor in enumerate(inputs):
            self.bind(tensor, self.graph.placeholder(f"input_{number}"))
            self._fixed.add(tensor.untyped_storage().data_ptr())

    def bind(self, tensor: torch.Tensor, node: Node) -> None:
        """Say which node a tensor is, and remember its value as it is now."""
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            same = self._by_storage.setdefault(tensor.untyped_storage().data_ptr(), [])
            same.append(weakref.ref(tensor))
            value = tensor.detach()
            node.meta["example_value"] = value if self._mark_slice(tensor, node) else value.clone()

    def _mark_slice(self, tensor: torch.Tensor, node: Node) -> bool:
        """Note on a node that it is a parameter or a view of one, which need not be copied."""
        known = self._parameters.get(tensor.untyped_storage().data_ptr())
        if known is None:
            return False
        path, parameter = known
        offset = int(tensor.storage_offset() - parameter.storage_offset())
        node.meta["slice"] = Slice(path, offset, tuple(tensor.shape), tensor.stride())
        return True

    def node_of(self, value: Any) -> Any:
        """Give the node, or the constant, that stands for a value in the graph.

        Raises `Unrecordable` for a tensor that is neither computed here nor the module's own.
        """
        if isinstance(value, torch.Tensor):
            if id(value) in self._nodes:
                return self._nodes[id(value)]
            if id(value) not in self._paths:
                raise Unrecordable("it reads a tensor from outside of the module")
            self.bind(value, self.graph.get_attr(self._paths[id(value)]))
            return self._nodes[id(value)]
        if isinstance(value, Size):
            return value.node
        if isinstance(value, Count):
            return plain(value)
        if isinstance(value, (tuple, list)):
            parts = [self.node_of(one) for one in cast(Sequence[Any], value)]
            return tuple(parts) if isinstance(value, tuple) else parts
        if isinstance(value, dict):
            return {key: self.node_of(one) for key, one in cast(dict[str, Any], value).items()}
        if isinstance(value, slice):
            bounds = cast("slice[Any, Any, Any]", value)
            return slice(*map(self.node_of, (bounds.start, bounds.stop, bounds.step)))
        if type(value).__module__ == "numpy":
            return value.item()
        return value

    def routes(self) -> bool:
        """Tell whether something was chosen by score, or came in as ids."""
        chosen = ("topk", "argmax", "argsort", "sort")
        for node in self.graph.nodes:
            value = node.meta.get("example_value")
            ids = node.op == "placeholder" and value is not None and value.dtype == torch.int64
            best = op_name(node) == "max" and value is None  # of values and indices
            if ids or best or op_name(node) in chosen:
                return True
        return False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a call and record it."""
        kwargs = kwargs or {}
        plain_args, plain_kwargs = tree_map(plain, (args, kwargs))
        if self.paused:
            return func(*plain_args, **plain_kwargs)
        name = _name(func)
        if name in ("__iter__", "__reversed__"):
            with self:
                parts = args[0].unbind(0)
            return iter(parts if name == "__iter__" else parts[::-1])
        known = self.node_of(args), self.node_of(kwargs)  # before an in-place call changes names
        if name == "__len__" and not _is_part(known[0][0]):
            raise Unrecordable("it takes the len() of a tensor, which fixes a size; use .shape[0]")
        if name in ("__int__", "__index__") and counts_tokens(known[0][0]):
            raise Unrecordable("it calls int() on a count of tokens, which hides where that goes")
        result = func(*plain_args, **plain_kwargs)
        if name in _PLAIN_METHODS or (_is_property(func) and name in PLAIN_PROPERTIES):
            return result
        if isinstance(result, torch.Size) or name in ("size", "numel"):
            return self._sizes(result, func, known)
        if name in _DECIDING or (not _is_tensors(result) and name != "__setitem__"):
            self.decisions += [one for one in tree_leaves(known) if isinstance(one, Node)]
            read = name in ("item", "numpy", "tolist") and counts_tokens(known[0][0])
            return as_counts(result) if read else result
        return self._record(func, name, args, kwargs, known, result)

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, known: Any, result: Any) -> Any:
        node = self._call(func, *known)
        self.decisions += [self._nodes[id(one)] for one in _deciding(name, args)]
        written = _written(name, args, kwargs)
        if written is not None:
            self._write(written, node)
            return result
        if isinstance(result, torch.Tensor):
            self.bind(result, node)
        else:
            node.meta["example_value"] = None
            for number, part in enumerate(result):
                if isinstance(part, torch.Tensor):
                    self.bind(part, self.graph.call_function(operator.getitem, (node, number)))
        return result

    def _sizes(self, result: Any, func: Any, known: tuple[Any, Any]) -> Any:
        """Tie the sizes of a tensor to nodes; those of parameters are what they are."""
        if _is_part(known[0][0]):
            return result
        node = self._call(func, *known)
        if isinstance(result, int):
            return Size.of(result, node)
        sizes = enumerate(cast(tuple[int, ...], result))
        return torch.Size(
            [
                Size.of(size, self.graph.call_function(operator.getitem, (node, number)))
                for number, size in sizes
            ]
        )

    def _call(self, func: Any, args: Any, kwargs: Any) -> Node:
        name = _name(func)
        if _is_property(func):
            return self.graph.call_function(getattr, (args[0], name))
        if name in ("__getitem__", "__setitem__"):
            return self.graph.call_function(getattr(operator, name.strip("_")), args)
        if getattr(torch.Tensor, name, None) is func:
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)

    def _write(self, tensor: torch.Tensor, node: Node) -> None:
        """Give a written tensor, and everything that shares its memory, new nodes."""
        storage = tensor.untyped_storage().data_ptr()
        if storage in self._fixed:
            raise Unrecordable("it writes to its inputs or its parameters")
        others = [reference() for reference in self._by_storage.get(storage, ())]
        base = node
        if node.target is operator.setitem:  # it gives nothing back
            base = self.graph.call_function(after, (self.node_of(tensor), node))
        self.bind(tensor, base)
        for other in {id(other): other for other in others if other is not None}.values():
            if other is not tensor:
                self.bind(other, self.graph.call_function(after, (self._nodes[id(other)], node)))


def _is_part(node: Any) -> bool:
    """Tell whether a value is a parameter or shows a part of one."""
    return isinstance(node, Node) and "slice" in node.meta


def _is_property(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def _name(func: Any) -> str:
    name: str = func.__self__.__name__ if _is_property(func) else getattr(func, "__name__", "")
    return name


def _is_tensors(result: Any) -> bool:
    if isinstance(result, (tuple, list)):
        parts = cast(Sequence[Any], result)
        return bool(parts) and any(isinstance(part, torch.Tensor) for part in parts)
    return isinstance(result, torch.Tensor)


def _deciding(name: str, args: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    """Give the tensors whose values decide the size of a call's result.

    Floats that are asked where they are not 0 do not count: such an expert adds nothing.
    """
    if name in ("__getitem__", "__setitem__"):
        indices = (one for one in tree_leaves(args[1]) if isinstance(one, torch.Tensor))
        return [one for one in indices if one.dtype in (torch.bool, torch.uint8)]
    if name == "masked_select":
        return args[1:2]
    by_values = name in _SIZED_BY_VALUES and not (name == "where" and len(args) > 1)
    return [one for one in args[:1] if by_values and not one.is_floating_point()]


def _written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Give the tensor that a call writes to."""
    if isinstance(kwargs.get("out"), torch.Tensor):
        return kwargs["out"]
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    dunder = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    if (in_place or dunder or kwargs.get("inplace") is True) and isinstance(args[0], torch.Tensor):
        return args[0]
    return None

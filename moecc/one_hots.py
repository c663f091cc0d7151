"""Let one-hot encodings whose number of classes depends on values be traced.

`F.one_hot` refuses an index beyond its classes, so models that want such rows to be zero count the
classes first and cut off what is too many:

    def safe_one_hot(index, classes):
        return F.one_hot(index, max(index.max() + 2, classes))[..., :classes]

Dynamo breaks the graph there, in the middle of a capacity router. Where a model's code calls such a
function, the name in its module gets a dispatcher: while our backend traces, it writes the encoding
as a comparison, which has the same values and a size that does not depend on them. Every other call
gets the function as it was. What a function is like is found by recording it, not by its name.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from moecc.observe.recorder import Recorder
from moecc.passes.pattern import op_name

_PROBES = ((5, 3), (5, 4), (5, 5), (5, 6), (5, 9), (1, 0), (1, 3), (8, 2))
"""Numbers of classes, and the largest index that an encoding with them is recorded on."""


@dataclass(slots=True)
class _Replaced:
    """A function with our dispatcher in its place."""

    own: FunctionType
    scope: dict[str, Any]
    name: str
    models: "weakref.WeakSet[nn.Module]"


_replaced: dict[FunctionType, _Replaced] = {}
"""What was replaced, by dispatcher."""


def adopt(model: nn.Module, traced_by_us: Callable[[], bool]) -> None:
    """Put a dispatcher before every such function that the forwards of a model call by name."""
    for kind in {type(module) for module in model.modules()}:
        for scope, name, function in _called(kind):
            if function in _replaced:
                _replaced[function].models.add(model)
            elif _encodes(function):
                scope[name] = dispatcher = _dispatcher(function, traced_by_us)
                users = weakref.WeakSet([model])
                _replaced[dispatcher] = _Replaced(function, scope, name, users)


def release(model: nn.Module) -> None:
    """Give the functions back that no other compiled model calls."""
    for dispatcher, replaced in [*_replaced.items()]:
        replaced.models.discard(model)
        if not replaced.models:
            replaced.scope[replaced.name] = _replaced.pop(dispatcher).own


def _called(kind: type[nn.Module]) -> Iterator[tuple[dict[str, Any], str, FunctionType]]:
    """List the plain functions that a class calls by a name of its module, and theirs in turn."""
    inherited = [base for base in kind.__mro__ if base.__module__.partition(".")[0] != "torch"]
    methods = [one for base in inherited for one in vars(base).values()]
    waiting = [one for one in methods if isinstance(one, FunctionType)]
    seen = set(waiting)
    while waiting:
        caller = waiting.pop()
        for name in caller.__code__.co_names:
            function = caller.__globals__.get(name)
            if isinstance(function, FunctionType) and function not in seen:
                seen.add(function)
                if function.__module__.partition(".")[0] != "torch":
                    waiting.append(function)
                    yield caller.__globals__, name, function


def _encodes(function: FunctionType) -> bool:
    """Tell whether `function(index, classes)` is a one-hot encoding cut off at `classes`."""
    code = function.__code__
    if code.co_argcount != 2 or code.co_kwonlyargcount or "one_hot" not in code.co_names:
        return False
    try:
        return all(_cuts_off(function, *probe) for probe in _PROBES)
    except Exception:  # whatever a stranger's function raises on arguments it does not take
        return False


def _cuts_off(function: FunctionType, classes: int, largest: int) -> bool:
    index = torch.arange(largest + 1).flip(0).reshape(1, -1)
    recorder = Recorder(nn.Module(), [index])
    with torch.no_grad(), recorder:
        result = function(index, classes)
    node = recorder.node_of(result)
    encoded = node.args[0] if isinstance(node, Node) and node.args else None
    if not isinstance(encoded, Node) or node.target is not operator.getitem:
        return False
    one_hot = op_name(encoded) == "one_hot" and encoded.args[0] is recorder.node_of(index)
    cut = node.args[1] == (Ellipsis, slice(None, classes, None))
    return one_hot and cut and torch.equal(result, compared(index, classes))


def compared(index: torch.Tensor, classes: int) -> torch.Tensor:
    """Encode index [..] as [.., classes], a row of zeros for what is beyond."""
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).to(torch.int64)


def _dispatcher(own: FunctionType, traced_by_us: Callable[[], bool]) -> FunctionType:
    @torch.compiler.assume_constant_result
    def is_ours() -> bool:
        return traced_by_us()

    @functools.wraps(own)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and torch.compiler.is_dynamo_compiling() and is_ours():
            return compared(*args)
        return own(*args, **kwargs)

    return cast(FunctionType, dispatch)

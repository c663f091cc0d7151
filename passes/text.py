"""Print a graph as text that a person can read and diff, and that torch releases do not churn.

%hidden = placeholder                              # f32[T, 64]
%experts = moecc.experts(%hidden, %ids, ...)       # f32[T, 64]  model.layers.0.mlp.experts
"""

import difflib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from moecc.passes.pattern import target_name
from moecc.passes.source import module_path, value_name

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "bool": "b", "complex": "c"}


def graph_text(graph: Graph) -> str:
    """Print one node a line: name, call, and what it yields as a comment; then each callee."""
    text = "\n".join(node_text(node) for node in graph.nodes) + "\n"
    for name in dict.fromkeys(str(node.target) for node in graph.find_nodes(op="call_module")):
        callee = graph.owning_module.get_submodule(name) if graph.owning_module else None
        text += f"\n{name}:\n{graph_text(callee.graph)}" if isinstance(callee, GraphModule) else ""
    return text


def node_text(node: Node) -> str:
    """Print one node."""
    value = node.meta.get("example_value")
    made = value_text(value) if isinstance(value, torch.Tensor) else ""
    path = "" if node.op == "placeholder" else module_path(node)
    comment = "  ".join(part for part in (made, path) if part)
    if node.op == "placeholder":
        line = f"{value_name(node)} = placeholder"
    elif node.op == "output":
        return f"return {_argument(node.args[0])}"
    else:
        named = {key: _argument(value) for key, value in node.kwargs.items()}
        args = [_argument(arg) for arg in node.args] + [f"{k}={v}" for k, v in named.items()]
        line = f"%{node.name} = {_target(node)}({', '.join(args)})"
    return f"{line}  # {comment}" if comment else line


def value_text(value: torch.Tensor) -> str:
    """Print a tensor's dtype and shape, `bf16[s0, 2048]`."""
    name = str(value.dtype).removeprefix("torch.")
    kind = name.rstrip("0123456789")
    short = _SHORT.get(kind, kind) + name[len(kind) :]
    return f"{short}[{', '.join(map(str, value.shape))}]"


def graph_diff(before: str, after: str, name: str) -> str:
    """Show what a pass changed as a unified diff."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), f"before {name}", f"after {name}", "", "", 2, ""
    )
    return "\n".join(lines)


def _target(node: Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    packet = str(getattr(node.target, "_qualified_op_name", ""))
    overload = getattr(node.target, "overloadpacket", None)
    packet = packet or str(getattr(overload, "_qualified_op_name", ""))
    return packet.replace("::", ".") or target_name(node.target)


def _argument(value: Any) -> str:
    match value:
        case Node():
            return value_name(value)
        case slice():
            limits = cast("slice[Any, Any, Any]", value)
            parts = [limits.start, limits.stop, limits.step][: 2 if limits.step is None else 3]
            return ":".join("" if part is None else _argument(part) for part in parts)
        case list():
            return f"[{_arguments(cast(list[Any], value))}]"
        case tuple():
            return f"({_arguments(cast(tuple[Any, ...], value))})"
        case dict():
            pairs = cast(dict[Any, Any], value).items()
            return "{" + ", ".join(f"{key}: {_argument(one)}" for key, one in pairs) + "}"
        case str():
            return repr(value)
        case _:
            return "..." if value is Ellipsis else str(value)


def _arguments(values: Iterable[Any]) -> str:
    return ", ".join(map(_argument, values))

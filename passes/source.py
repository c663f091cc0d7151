"""Say where in the user's model a node comes from: labels for reports, never decisions."""

import re
from pathlib import PurePath

from torch.fx import Node

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')
_LIFTED = ("l_self_modules_", "l_self_parameters_", "l_self_buffers_")


def module_path(node: Node) -> str:
    """Give the path of the innermost module around a node, `model.layers.3.mlp.experts`."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path: str = [*stack.values()][-1][0]
    path = re.sub(r"L\['(\w+)'\]\.?", "", path)
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).lstrip(".")


def value_name(node: Node) -> str:
    """Name a node for a reader: an input by its path in the model, anything else by its name.

    Dynamo calls a parameter `l_self_modules_layers_modules_0_modules_mlp_parameters_w_`.
    """
    if node.op != "placeholder" or not node.name.startswith(_LIFTED):
        return f"%{node.name}"
    path = re.sub("_(modules|parameters|buffers)_", ".", node.name[len("l_self") :])
    return "@" + path.strip("_.")


def source_line(node: Node) -> str:
    """Give the innermost line of the user's source, `modeling_mixtral.py:127`, or nothing."""
    frames = _FRAME.findall(str(node.meta.get("stack_trace") or ""))
    for file, line in reversed(frames):
        parts = PurePath(file).parts
        if (
            not file.startswith("<")
            and "integrations" not in parts
            and not {"moecc", "torch"}.intersection(parts[-3:-1])
        ):
            return f"{PurePath(file).name}:{line}"
    return ""

"""Run one MoE layer with onnxruntime's CPU kernel, `com.microsoft.MoE`, in float32.

Needs PyPI's `onnx` and `onnxruntime` (`pip install moecc[onnx]`). The operator wants gate and up
rows in turn and does its own top-k: it is given logits that are the logarithms of the weights, and
very small elsewhere, so that it chooses the same experts with the same weights.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

_NOWHERE = -1e4
"""A logit whose expert is never chosen."""


def installed() -> bool:
    """Tell whether onnxruntime and what writes its graphs are there."""
    return all(find_spec(name) is not None for name in ("onnx", "onnxruntime"))


def build(
    gate_up: torch.Tensor, down: torch.Tensor, active: int, threads: int
) -> Callable[..., torch.Tensor]:
    """Build a session for weights [E, 2I, H], [E, H, I]; returns `run(hidden, ids, weights)`."""
    onnxruntime: Any = import_module("onnxruntime")
    experts, rows, _ = gate_up.shape
    halves = gate_up.view(experts, 2, rows // 2, -1).transpose(1, 2).flatten(1, 2).contiguous()
    weights = {"gate_up": halves, "down": down.contiguous()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(one.numpy()) for one in weights.values()]
    options.add_external_initializers([*weights], values)
    graph = _graph(weights, active)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(hidden: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(hidden), experts), _NOWHERE).scatter_(1, ids, shares.log())
        (out,) = session.run(None, {"hidden": hidden.numpy(), "logits": logits.numpy()})
        return torch.from_numpy(out)

    return run


def _graph(weights: dict[str, torch.Tensor], active: int) -> bytes:
    """Write the graph of one operator, whose weights come from outside: a file holds 2 GiB."""
    helper: Any = import_module("onnx").helper
    protos: Any = import_module("onnx").TensorProto
    kind = protos.FLOAT
    experts, hidden, _ = weights["down"].shape
    node = helper.make_node(
        "MoE",
        ["hidden", "logits", "gate_up", "", "down"],
        ["out"],
        domain="com.microsoft",
        k=active,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        swiglu_limit=3e38,
        normalize_routing_weights=1,
    )
    names = (("hidden", hidden), ("logits", experts))
    inputs = [helper.make_tensor_value_info(name, kind, ["T", size]) for name, size in names]
    outputs = [helper.make_tensor_value_info("out", kind, ["T", hidden])]
    outside: list[Any] = []
    for name, one in weights.items():
        tensor = protos(name=name, data_type=kind, dims=one.shape)
        tensor.data_location = protos.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        outside.append(tensor)
    graph = helper.make_graph([node], "layer", inputs, outputs, outside)
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=versions, ir_version=10)
    return made.SerializeToString()

"""Say in what blocks the persistent kernels read tensors, as the descriptors that TMA follows.

Weights are seen as [E, parts, rows, columns], or [E, columns, parts, rows] if transposed, where
gates and ups in two halves are two parts: one block has both.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from moecc.codegen.gpus import Gpu
from moecc.codegen.spec import KernelSpec
from moecc.codegen.triton_inputs import Inputs
from moecc.codegen.triton_tiles import Tile

Blocks = Mapping[str, tuple[int, ...]]
"""By the name of the argument."""
ALIGNMENT = 16
"""Bytes: of where a tensor begins, and of the steps along its dimensions but the last."""


def persistent_blocks(
    spec: KernelSpec, gpu: Gpu, first: Tile, second: Tile
) -> tuple[Blocks, Blocks]:
    """Give the blocks of both kernels, for tiles of these sizes."""
    parts, rows = _parts(spec), first.n * (2 if spec.gated else 1)
    states = {"hidden_ptr": (1, first.k)} if gpu.gathers else {}
    gate_up = _block((parts, rows // parts), first.k, spec.transposed)
    down = _block((1, second.n), second.k, spec.down_transposed)
    return (
        {"weight_desc": gate_up, **states},
        {"weight_desc": down, "inner_desc": (second.m, second.k)},
    )


def view_weights(spec: KernelSpec, x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Give both products' weights the dimensions of their blocks."""
    parts, at = _parts(spec), 2 if spec.transposed else 1
    shape = (*x.gate_up.shape[:at], parts, x.gate_up.shape[at] // parts, *x.gate_up.shape[at + 1 :])
    return x.gate_up.view(shape), x.down.unsqueeze(2 if spec.down_transposed else 1)


def are_aligned(x: Inputs) -> bool:
    """Tell whether a call's tensors lie where descriptors may point."""
    return all(
        tensor.data_ptr() % ALIGNMENT == 0
        and tensor.stride(0) * tensor.element_size() % ALIGNMENT == 0
        for tensor in (x.hidden, x.gate_up, x.down)
    )


def describe_tensor(tensor: Any, block: tuple[int, ...]) -> Any:
    """Make the argument that a kernel takes in the place of a tensor."""
    triton: Any = import_module("triton.tools.tensor_descriptor")
    return triton.TensorDescriptor.from_tensor(tensor, list(block))


def _parts(spec: KernelSpec) -> int:
    return 2 if spec.gated and not spec.interleaved else 1


def _block(rows: tuple[int, int], columns: int, transposed: bool) -> tuple[int, ...]:
    return (1, columns, *rows) if transposed else (1, *rows, columns)

"""Give a model weights that have shapes and dtypes and take no memory, to be traced with."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moecc.runtime.modules import named_modules


def without_weights(model: nn.Module) -> FakeTensorMode:
    """Put fake tensors in the place of a model's parameters and buffers, as if they were on a CPU.

    Under the mode that is returned, the model computes the shapes of what it would compute.
    """
    mode = FakeTensorMode()
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for _, module in named_modules(model):
        for kind in ("_parameters", "_buffers"):
            tensors: dict[str, torch.Tensor | None] = getattr(module, kind)
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _fake(tensor, mode)
                tensors[name] = made[id(tensor)]
    return mode


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    size, stride, dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype
    with mode:
        empty = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(empty, requires_grad=False)
        return empty

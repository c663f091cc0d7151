"""Check the tensors of a call to the Triton kernels, which would read anything."""

from dataclasses import dataclass

import torch

from moecc.codegen.spec import KernelSpec
from moecc.codegen.triton_packed import describe
from moecc.runtime.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The tensors of one call, as `ExpertsFn` lists them, and the slots of `AddExpertsFn`."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    up: torch.Tensor | None = None
    learned: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    """[E] int64 on the device: where each expert lies; negative are not there."""
    shared: torch.Tensor | None = None
    """[T, H], added to the sum over a token's experts."""
    shared_scale: torch.Tensor | None = None
    """[T, 1], which scales `shared`."""


def check_inputs(spec: KernelSpec, x: Inputs) -> None:
    """Refuse tensors that the kernels would read out of bounds or in the wrong layout.

    Raises `InputError` naming the tensor, what it is and what the spec asks for.
    """
    if x.ids.ndim != 2:
        raise InputError(
            f"ids is {tuple(x.ids.shape)}; it needs two dimensions, tokens and experts"
        )
    _check_matrices(spec, x)
    experts, hidden, inner = spec.experts, spec.hidden, spec.intermediate
    others: dict[str, tuple[torch.Tensor | None, tuple[int, ...] | None]] = {
        "hidden": (x.hidden, (x.ids.shape[0], hidden)),
        "weights": (x.weights, tuple(x.ids.shape)),
        "gate_up_bias": (x.gate_up_bias, (experts, spec.rows) if spec.bias else None),
        "down_bias": (x.down_bias, (experts, hidden) if spec.bias else None),
        "learned": (x.learned, (experts, inner) if spec.learned else None),
        "shared": (x.shared, None if x.shared is None else tuple(x.hidden.shape)),
        "shared_scale": (x.shared_scale, None if x.shared_scale is None else (len(x.hidden), 1)),
        "slots": (x.slots, None if x.slots is None else (experts,)),
    }
    for name, (tensor, shape) in others.items():
        given = None if tensor is None else tuple(tensor.shape)
        if given != shape:
            raise InputError(f"{name} is {given}; {spec.key!r} needs {shape}")


def _check_matrices(spec: KernelSpec, x: Inputs) -> None:
    """Check the experts' matrices; in slots there may be any number of them, wide apart."""
    if (x.up is not None) != spec.split:
        raise InputError(
            f"up is {'missing' if spec.split else 'given'}; "
            f"{spec.key!r} has gate and up in {'two tensors' if spec.split else 'one'}"
        )
    first = (spec.intermediate if spec.split else spec.rows, spec.hidden)
    second, dtype = (spec.hidden, spec.intermediate), spec.dtype
    if spec.schemes is not None:
        first = (describe(spec.schemes.first, *first).bytes,)
        second, dtype = (describe(spec.schemes.second, *second).bytes,), torch.uint8
    first = first[::-1] if spec.transposed else first
    second = second[::-1] if spec.down_transposed else second
    matrices = {"gate_up": (x.gate_up, first), "down": (x.down, second)}
    if x.up is not None:
        matrices["up"] = (x.up, first)
    for name, (tensor, matrix) in matrices.items():
        shape = (spec.experts if x.slots is None else len(tensor), *matrix)
        plain = tensor.is_contiguous() if x.slots is None else tensor[:1].is_contiguous()
        if (tensor.shape, tensor.dtype) != (shape, dtype) or not plain:
            raise InputError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}; "
                f"{spec.key!r} needs a contiguous {dtype} {list(shape)}"
            )
    if x.up is not None and x.up.stride(0) != x.gate_up.stride(0):
        raise InputError(f"up has strides {x.up.stride()}, gate_up {x.gate_up.stride()}")

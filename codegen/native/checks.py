"""Hold the tensors of a call against the spec of its kernel: C++ would read beyond them."""

import torch

from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError
from moecc.runtime.schemes.packing import packed_bytes
from moecc.runtime.schemes.scheme import Scheme


def check_routing(
    spec: KernelSpec, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """Raise `InputError` unless the tensors that change with every call fit the spec."""
    for name, tensor in (("hidden", hidden), ("ids", ids), ("weights", weights)):
        if not tensor.is_cpu or tensor.dim() != 2:
            raise _misfit(name, tensor, "two dimensions on cpu")
    if hidden.shape[1] != spec.hidden:
        raise _misfit("hidden", hidden, f"[T, {spec.hidden}]")
    if ids.shape[0] != hidden.shape[0]:
        raise _misfit("ids", ids, f"[{hidden.shape[0]}, K], one row for each of hidden")
    if weights.shape != ids.shape:
        raise _misfit("weights", weights, f"{[*ids.shape]}, as ids")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise _misfit("ids", ids, "integers")
    for name, tensor in (("hidden", hidden), ("weights", weights)):
        if not tensor.is_floating_point():
            raise _misfit(name, tensor, "floating point")


def check_slots(
    spec: KernelSpec, onto: torch.Tensor, slots: torch.Tensor, hidden: torch.Tensor, held: int
) -> None:
    """Raise `InputError` unless a partial call knows where to add and where experts lie."""
    plain = onto.is_contiguous() and onto.device.type == "cpu"
    if onto.shape != hidden.shape or onto.dtype != torch.float32 or not plain:
        raise _misfit("onto", onto, f"contiguous torch.float32 {[*hidden.shape]} on cpu")
    plain = slots.is_contiguous() and slots.device.type == "cpu"
    if slots.shape != (spec.experts,) or slots.dtype != torch.int64 or not plain:
        raise _misfit("slots", slots, f"contiguous torch.int64 [{spec.experts}] on cpu")
    if int(slots.max()) >= held:
        raise InputError(f"slots name slot {int(slots.max())} and weights have {held} slots")


def check_weights(
    spec: KernelSpec,
    experts: int,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor | None,
) -> None:
    """Raise `InputError` unless tensors of so many experts are those that the spec says."""
    hidden, inner = spec.hidden, spec.intermediate
    if spec.schemes is not None:
        _check_packed("gate_up", gate_up, spec.schemes.first, (experts, inner, hidden))
        _check_packed("down", down, spec.schemes.second, (experts, hidden, inner))
        if spec.split:
            _check_packed("up", up, spec.schemes.first, (experts, inner, hidden))
        return
    first, second = (inner if spec.split else spec.rows, hidden), (hidden, inner)
    if spec.transposed:
        first = first[::-1]
    if spec.down_transposed:
        second = second[::-1]
    _check_weight("gate_up", gate_up, spec, (experts, *first), strided=True)
    _check_weight("down", down, spec, (experts, *second), strided=True)
    if spec.split:
        _check_weight("up", up, spec, (experts, *first), strided=True)
    elif up is not None:
        raise InputError("up was given to a kernel whose spec has gate and up in one tensor")


def check_vectors(
    spec: KernelSpec,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    learned: torch.Tensor | None,
) -> None:
    """Raise `InputError` unless there is a vector for an expert just where the spec has one."""
    experts, hidden = spec.experts, spec.hidden
    if spec.learned:
        _check_weight("learned", learned, spec, (experts, spec.intermediate))
    elif learned is not None:
        raise InputError("learned was given to a kernel whose activation does not read it")
    if spec.bias:
        _check_weight("gate_up_bias", gate_up_bias, spec, (experts, spec.rows))
        _check_weight("down_bias", down_bias, spec, (experts, hidden))
    elif gate_up_bias is not None or down_bias is not None:
        raise InputError("a bias was given to a kernel whose spec has none")


def _check_weight(
    name: str,
    tensor: torch.Tensor | None,
    spec: KernelSpec,
    shape: tuple[int, ...],
    *,
    strided: bool = False,
) -> None:
    """Raise `InputError` unless a tensor of the layer fits the spec."""
    expected = f"{spec.dtype} {[*shape]} on cpu"
    if tensor is None:
        raise InputError(f"{name} is missing; expected {expected}")
    if tensor.shape != shape or tensor.dtype != spec.dtype or not tensor.is_cpu:
        raise _misfit(name, tensor, expected)
    if strided and tensor.stride(-1) != 1 and shape[-1] != 1:
        raise _misfit(name, tensor, "its last dimension contiguous (stride 1); call .contiguous()")


def _check_packed(
    name: str, tensor: torch.Tensor | None, scheme: Scheme, shape: tuple[int, int, int]
) -> None:
    """Raise `InputError` unless a tensor is as long as matrices [E, N, K] packed in a scheme."""
    size = packed_bytes(*shape[1:], scheme)
    if (
        tensor is not None
        and tensor.shape == (shape[0], size)
        and tensor.dtype == torch.uint8
        and tensor.is_cpu
        and tensor.stride(1) == 1
    ):
        return  # texts are for errors alone: this runs with every call
    expected = f"{[*shape]} packed as {scheme}: torch.uint8 {[shape[0], size]}"
    if tensor is None:
        raise InputError(f"{name} is missing; expected {expected}")
    raise _misfit(name, tensor, expected)


def _misfit(name: str, tensor: torch.Tensor, expected: str) -> InputError:
    found = f"{tensor.dtype} {[*tensor.shape]} with strides {[*tensor.stride()]} on {tensor.device}"
    return InputError(f"{name} is {found}; expected {expected}")

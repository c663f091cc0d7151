"""Hand the tensors of a call to a built kernel."""

import ctypes
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moecc.codegen.native.checks import check_routing, check_vectors, check_weights
from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError
from moecc.runtime.schemes.packing import panel_bytes
from moecc.runtime.schemes.scheme import Scheme

Tensor = torch.Tensor | None

_forked: list[int] = []
"""Not empty in a forked child, which has OpenMP's records of threads but not the threads: it would
wait for them for ever, so it computes with one."""
os.register_at_fork(after_in_child=lambda: _forked.append(os.getpid()))


class Layer(ctypes.Structure):
    """The arguments of `moecc_experts`; the order of `struct Layer` in experts.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "ids", "weights", "first", "up")),
        *(
            (name, ctypes.c_void_p)
            for name in ("second", "first_bias", "second_bias", "learned", "out")
        ),
        *((name, ctypes.c_int64) for name in "TKHIE"),
        *(
            (f"{which}_{what}", ctypes.c_int64)
            for which in ("first", "up", "second")
            for what in ("expert", "row")
        ),
        ("out_float", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("onto", ctypes.c_int64),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Tensors that fit a spec, as arguments of calls.

    They are checked once: the weights of one token drive Python out of the caches, and what the
    next call runs of it comes from memory as they do.
    """

    layer: Layer
    """All but the tokens."""
    origins: tuple[Callable[[], Tensor], ...]
    places: tuple[object, ...]
    copies: tuple[torch.Tensor, ...]
    """Of biases that were not contiguous: they are made for one call."""

    def is_of(self, experts: tuple[Tensor, ...]) -> bool:
        """Tell whether these are the same tensors, in the same place and of the same kind."""
        return len(experts) == len(self.origins) and all(
            one is origin() and _place(one) == place
            for one, origin, place in zip(experts, self.origins, self.places, strict=True)
        )


def _place(tensor: Tensor) -> object:
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def check(spec: KernelSpec, held: int, experts: tuple[Tensor, ...]) -> Block:
    """Check the tensors of so many experts, listed as in `ExpertsFn`; the last two may be left out.

    Raises `InputError` when they do not fit the spec.
    """
    gate_up, down, gate_up_bias, down_bias, up, learned = (*experts, None, None)[:6]
    if gate_up is None or down is None:
        raise InputError("gate_up and down are not both given")
    check_weights(spec, held, gate_up, down, up)
    check_vectors(spec, gate_up_bias, down_bias, learned)
    given = gate_up_bias, down_bias, learned
    vectors = [None if one is None else one.contiguous() for one in given]
    first, second = (spec.schemes.first, spec.schemes.second) if spec.schemes else (None, None)
    layer = Layer(
        *(None, None, None, *map(address, (gate_up, up, down, *vectors)), None, 0, 0),
        *(spec.hidden, spec.intermediate, spec.experts),
        *_strides(gate_up, spec.hidden, first),
        *_strides(gate_up if up is None else up, spec.hidden, first),
        *_strides(down, spec.intermediate, second),
    )
    copies = (one for one, origin in zip(vectors, given, strict=True) if one is not origin)
    return Block(
        layer=layer,
        origins=tuple((lambda: None) if one is None else weakref.ref(one) for one in experts),
        places=tuple(map(_place, experts)),
        copies=tuple(one for one in copies if one is not None),
    )


def call(
    spec: KernelSpec,
    function: Callable[[Any], int],
    tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block: Block,
    out: torch.Tensor,
    slots: Tensor = None,
) -> None:
    """Compute into `out`, or add to it what the experts in `slots` give."""
    check_routing(spec, *tokens)
    hidden, ids, weights = tokens
    x = plain(hidden, spec.dtype)
    ids = plain(ids, torch.int64)
    weights = plain(weights, torch.float32)
    layer = Layer.from_buffer_copy(block.layer)
    layer.hidden, layer.ids, layer.weights, layer.out = map(address, (x, ids, weights, out))
    layer.T, layer.K = ids.shape
    layer.out_float = out.dtype == torch.float32
    layer.threads = thread_count()
    layer.slots, layer.onto = address(slots), slots is not None
    if function(ctypes.byref(layer)):
        raise MemoryError(f"{tuple(ids.shape)} tokens and experts of {spec.key}")


def _strides(weights: torch.Tensor, columns: int, scheme: Scheme | None) -> tuple[int, ...]:
    """Give the elements from one expert to the next, and from one row, or panel, to the next."""
    if scheme is None:
        return weights.stride()[:2]
    return weights.stride(0), panel_bytes(columns, scheme)


def thread_count() -> int:
    """Give the threads that a call may use."""
    return 1 if _forked else torch.get_num_threads()


def plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give a tensor contiguous and in a dtype; calls that change nothing take a microsecond."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def address(tensor: torch.Tensor | None) -> int | None:
    """Give where a tensor's first element lies, None for no tensor."""
    return None if tensor is None else tensor.data_ptr()

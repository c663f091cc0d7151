"""Run Triton kernels on CPU tensors, in a process that can also compile them.

    with interpreted():
        kernel[grid](*cpu_tensors)

Triton decides whether a function is interpreted when `@triton.jit` decorates it, for the whole
process. Here the decision is made per call: inside the block, launching or calling a `JITFunction`
interprets it. Three things are added to Triton's own interpreter:

- bfloat16 is right. Triton stores it as uint16 and computes on the bit patterns.
- A load or store outside the tensors of the launch raises, as does a second program that stores
  where one did before: on a GPU the first is silent and the second a race.
- numpy does not warn of what a GPU does silently (inf, NaN).

This leans on private parts of triton; `test_triton_interpreter.py` says when they have moved.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.experimental.gluon  # noqa: F401  imported lazily by triton, too late for the patches
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Interpret every launch of a Triton kernel."""
    functions: dict[Any, InterpretedFunction] = {}

    def interpret(function: JITFunction) -> InterpretedFunction:
        return functions.setdefault(function.fn, InterpretedFunction(function.fn))

    def launch(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in args]
        tensors = [arg for arg in (*given, *kwargs.values()) if isinstance(arg, torch.Tensor)]
        with Memory(tensors).watched(), np.errstate(all="ignore"):
            interpret(function).run(*args, grid=grid, warmup=warmup, **kwargs)

    def call(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
        # Not InterpretedFunction.__call__, which patches triton.language and leaves it so.
        return interpret(function).rewrite()(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        # A launch patches the modules that its kernel names: `tl`. Functions of the standard
        # library name `tl.core`.
        stack.callback(interpreter._patch_lang(tl.standard.sum.fn).restore)
        for name, patch in {"run": launch, "__call__": call}.items():
            stack.enter_context(mock.patch.object(JITFunction, name, patch))
        for name, patch in bfloat16_patches().items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, patch, create=True))
        yield


def widen(handle: TensorHandle) -> np.ndarray:
    """Read a handle's values, bfloat16 as float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> TensorHandle:
    """Round float32 values to nearest even bfloat16."""
    rounded = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def bfloat16_patches() -> dict[str, Callable[..., TensorHandle]]:
    """Replace the builder's methods that compute: widen, compute, round once."""

    def is_bfloat16(value: Any) -> bool:
        return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16

    def in_float32(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
        def method(self: InterpreterBuilder, *args: Any) -> TensorHandle:
            if not any(map(is_bfloat16, args)) or args[-1] is np.where:
                return original(self, *args)
            wide = [TensorHandle(widen(a), tl.float32) if is_bfloat16(a) else a for a in args]
            result = original(self, *wide)
            return result if result.data.dtype == np.bool_ else narrow(result.data)

        return method

    def cast(self: InterpreterBuilder, source: TensorHandle, dtype: Any, *_: Any) -> TensorHandle:
        if is_bfloat16(source) and dtype.scalar != tl.bfloat16:
            source = TensorHandle(widen(source), tl.float32)
        elif dtype.scalar == tl.bfloat16 and not is_bfloat16(source):
            return narrow(source.data)
        target = interpreter._get_np_dtype(dtype.scalar)
        return TensorHandle(source.data.astype(target), dtype.scalar)

    def dot(self: InterpreterBuilder, a: Any, b: Any, acc: Any, *_: Any) -> TensorHandle:
        product = np.matmul(widen(a).astype(np.float32), widen(b).astype(np.float32))
        return TensorHandle(product + acc.data, acc.dtype.scalar)

    computing = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf")
    return {
        **{name: in_float32(getattr(InterpreterBuilder, name)) for name in computing},
        "cast_impl": cast,
        "create_fp_to_fp": cast,
        "create_dot": dot,
        "get_bf16": lambda self, value: narrow(np.array([value])),
    }


class Memory:
    """The bytes that one launch may touch, and which program wrote them."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        # Of experts in slots, what lies between their matrices is not the tensor's.
        parts = [part for t in tensors for part in ([t] if t.is_contiguous() else t.unbind())]
        spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in parts)
        self.starts = np.array([start for start, _ in spans], dtype=np.uint64)
        self.ends = np.array([end for _, end in spans], dtype=np.uint64)
        self.stores: list[np.ndarray] = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Check every load and store of the launch inside."""
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def checked_load(
            builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any
        ) -> TensorHandle:
            self.check(builder, pointers, mask, "load")
            return load(builder, pointers, mask, other, *rest, **options)

        def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            addresses = self.check(builder, pointers, mask, "store")
            program = np.ravel_multi_index(builder.grid_idx, builder.grid_dim)
            self.stores.append(np.stack([addresses, np.full_like(addresses, program)]))
            return store(builder, pointers, value, mask, *rest)

        with (
            mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
        ):
            yield
        if self.stores:
            address, _ = np.unique(np.concatenate(self.stores, axis=1), axis=1)
            if (address[1:] == address[:-1]).any():
                raise RuntimeError("two programs store to one place")

    def check(self, builder: Any, pointers: Any, mask: Any, kind: str) -> np.ndarray:
        """Return the addresses that the mask lets through; raises `IndexError` outside."""
        lanes = mask.data if isinstance(mask, TensorHandle) else mask  # descriptors: an array
        addresses, lanes = np.broadcast_arrays(pointers.data, lanes.astype(bool))
        addresses = addresses[lanes]
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        span = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        outside = (span < 0) | (addresses + np.uint64(size) > self.ends[np.maximum(span, 0)])
        if outside.any():
            nearest = int(addresses[outside][0] - self.starts[max(span[outside][0], 0)])
            raise IndexError(
                f"{kind} of {size} bytes at byte {nearest} of a tensor, which is outside of it, "
                f"in program {builder.grid_idx}"
            )
        return addresses

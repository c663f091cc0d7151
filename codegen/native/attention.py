"""Write the attention of few query tokens, and call it.

Each head of keys and values is read once for all query heads that share it, in place, and keys
that the mask closes at either end are not read. Scores, powers and sums are float32 (where the CPU
has bf16 dot products, it multiplies queries and keys with those); the result is rounded once. It
has the same bits for any number of threads.
"""

import ctypes
import functools
import struct
from dataclasses import dataclass

import torch

from moecc.codegen.native.build import load
from moecc.codegen.native.call import address, thread_count
from moecc.codegen.native.emit import TYPES, template
from moecc.runtime.attention import AttentionFn
from moecc.runtime.errors import InputError, UnsupportedSpec

DTYPES = tuple(TYPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel:
    """What serves every attention of few query tokens in a dtype."""

    key: str
    """Its name in graphs, reports and counters."""
    run: AttentionFn
    source: str


_TENSORS = ("query", "key", "value", "mask")


class _Attention(ctypes.Structure):
    """The arguments of `moecc_attention`; the order of `struct Attention` in attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_TENSORS, "out")),
        *((name, ctypes.c_int64) for name in ("B", "heads", "shared", "T", "S", "D", "V")),
        *(
            (f"{name}_{what}", ctypes.c_int64)
            for name in _TENSORS
            for what in ("batch", "head", "token")
        ),
        *((name, ctypes.c_int64) for name in ("mask_key", "mask_kind", "causal", "scale")),
        ("threads", ctypes.c_int64),
    ]


def emit(dtype: torch.dtype) -> AttentionKernel:
    """Write and build the kernel of all attention in a dtype.

    Raises `UnsupportedSpec` for a dtype that it is not for, `NoCompiler` (an `UnsupportedSpec`)
    when nothing can build it, `BuildError` when the build fails.
    """
    source = write(dtype)
    function = _load(source)

    def run(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        _check(dtype, query, key, value, mask)
        batch, heads, tokens, depth = query.shape
        groups, length, width = key.shape[1], key.shape[2], value.shape[3]
        query, key, value = map(_rows, (query, key, value))
        steps = (0, 0, 0, 0)
        if mask is not None:
            mask = mask.expand(batch, heads, tokens, length)
            steps = mask.stride()
        kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
        out = torch.empty(batch, tokens, heads, width, dtype=dtype)
        call = _Attention(
            *map(address, (query, key, value, mask, out)),
            *(batch, groups, heads // groups, tokens, length, depth, width),
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *steps,
            *(kind, causal, *struct.unpack("q", struct.pack("d", scale)), thread_count()),
        )
        if function(ctypes.byref(call)):
            raise MemoryError(f"attention of {[*query.shape]} to {length} keys")
        return out.transpose(1, 2)

    name = str(dtype).removeprefix("torch.")
    return AttentionKernel(key=f"native: attention {name} cpu", run=run, source=source)


def write(dtype: torch.dtype) -> str:
    """Write the C++ source of a dtype's attention; raises `UnsupportedSpec`."""
    if dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise UnsupportedSpec(f"attention in {names} has native kernels, in {dtype} none")
    headers = ("vec.h", "math.h", "dot.h", "axpy.h", "team.h", "tasks.h")
    model = f"using Model = {TYPES[dtype]};"
    return "\n".join([*map(template, headers), model, template("attention.cpp")])


@functools.cache
def _load(source: str):
    function = load(source).moecc_attention
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
    return function


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor whose last dimension lies in one piece."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _check(
    dtype: torch.dtype,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    """Raise `InputError` unless the kernel reads these tensors and nothing beyond them."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dim() != 4 or tensor.dtype != dtype or not tensor.is_cpu or tensor.is_meta:
            raise InputError(f"{name} is {_text(tensor)}; attention takes {dtype}, 4-d, on cpu")
    batch, heads, tokens, depth = query.shape
    groups, length = key.shape[1:3]
    fits = key.shape == (batch, groups, length, depth) and value.shape[:3] == key.shape[:3]
    if not fits or not groups or heads % groups:
        found = ", ".join(f"{name} {[*one.shape]}" for name, one in tensors.items())
        raise InputError(f"attention is given {found}; a key and a value serve groups of queries")
    if mask is None:
        return
    sizes = zip(reversed(mask.shape), (length, tokens, heads, batch), strict=False)
    spreads = mask.dim() <= 4 and all(size in (1, full) for size, full in sizes)
    if not spreads or mask.dtype not in (torch.bool, dtype) or not mask.is_cpu:
        expected = f"bool or {dtype} that broadcasts to {[batch, heads, tokens, length]}, on cpu"
        raise InputError(f"mask is {_text(mask)}; attention takes {expected}")


def _text(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {[*tensor.shape]}, {tensor.device}"

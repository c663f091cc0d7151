"""Run one MoE layer with llama.cpp's kernels: `ggml_mul_mat_id` and what llama.cpp puts around it.

The library comes from PyPI (`pip install moecc[llama]`) and is driven through its C interface, as
the public headers declare it. Weights are those of a checkpoint in GGUF: gate, up and down apart.
"""

import ctypes
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

TYPES = {"int8": 8, "int4": 2, "mxfp4": 39, "fp16": 1, "bf16": 30, "fp32": 0}
"""ggml's type of the same bits: Q8_0, Q4_0, MXFP4, F16, BF16, F32."""
NAMES = {
    "int8": "Q8_0",
    "int4": "Q4_0",
    "mxfp4": "MXFP4",
    "fp16": "F16",
    "bf16": "BF16",
    "fp32": "F32",
}
_I32, _F32, _MAX_THREADS = 26, 0, 512
_pointer, _size, _int, _long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64


class _InitParams(ctypes.Structure):
    _fields_ = [("size", _size), ("buffer", _pointer), ("no_alloc", ctypes.c_bool)]


class _PoolParams(ctypes.Structure):
    _fields_ = [
        ("mask", ctypes.c_bool * _MAX_THREADS), ("threads", _int), ("priority", _int),
        ("poll", ctypes.c_uint32), ("strict", ctypes.c_bool), ("paused", ctypes.c_bool),
    ]  # fmt: skip


class _Plan(ctypes.Structure):
    _fields_ = [("work_size", _size), ("work", _pointer), ("rest", ctypes.c_byte * 128)]


def installed() -> bool:
    """Tell whether the library is there."""
    return find_spec("libggml") is not None


class Layer:
    """The experts of one layer in ggml's format, with a pool of threads as llama.cpp keeps one."""

    def __init__(
        self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, kind: str, threads: int
    ) -> None:
        """Quantize float32 weights [E, I, H], [E, I, H] and [E, H, I]."""
        self._lib = _library()
        experts, inner, outer = gate.shape
        self._hidden = outer
        # Weights, and room for the results of a few graphs.
        weights = 3 * experts * inner * outer * 4
        self._context = self._lib.ggml_init(_InitParams(weights + (1 << 30), None, False))
        self._weights = [self._matrix(one, TYPES[kind]) for one in (gate, up, down)]
        params = self._lib.ggml_threadpool_params_default(threads)
        self._pool = self._lib.ggml_threadpool_new(ctypes.byref(params))
        self._threads = threads

    def _matrix(self, weight: torch.Tensor, kind: int) -> int:
        experts, rows, columns = weight.shape
        tensor = self._lib.ggml_new_tensor_3d(self._context, kind, columns, rows, experts)
        place = self._lib.ggml_get_data(tensor)
        for expert in range(experts):
            source = weight[expert].float().contiguous()
            part = self._lib.ggml_nbytes(tensor) // experts
            to = place + expert * part
            if kind == _F32:
                ctypes.memmove(to, source.data_ptr(), source.nbytes)
            else:
                self._lib.ggml_quantize_chunk(kind, source.data_ptr(), to, 0, rows, columns, None)
        return tensor

    def graph(self, tokens: int, active: int) -> Callable[..., torch.Tensor]:
        """Build the graph for so many tokens; returns `run(hidden, ids, weights)` -> [T, H]."""
        lib, context = self._lib, self._context
        outer = self._hidden
        gate, up, down = self._weights
        x = lib.ggml_new_tensor_3d(context, _F32, outer, 1, tokens)
        ids = lib.ggml_new_tensor_2d(context, _I32, active, tokens)
        weights = lib.ggml_new_tensor_3d(context, _F32, 1, active, tokens)
        first, second = (lib.ggml_mul_mat_id(context, one, x, ids) for one in (gate, up))
        rows = lib.ggml_swiglu_split(context, first, second)
        terms = lib.ggml_mul(context, lib.ggml_mul_mat_id(context, down, rows, ids), weights)
        total = None
        for slot in range(active):  # as llama.cpp adds them
            step = 4 * outer
            one = lib.ggml_view_2d(context, terms, outer, tokens, step * active, slot * step)
            total = one if total is None else lib.ggml_add(context, total, one)
        graph = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(graph, total)
        plan = lib.ggml_graph_plan(graph, self._threads, self._pool)
        work = ctypes.create_string_buffer(plan.work_size + 64)
        plan.work = ctypes.addressof(work)
        places = [lib.ggml_get_data(one) for one in (x, ids, weights)]
        out = torch.empty(tokens, outer)

        def run(*inputs: torch.Tensor) -> torch.Tensor:
            dtypes = (torch.float32, torch.int32, torch.float32)
            for place, one, dtype in zip(places, inputs, dtypes, strict=True):
                given = one.to(dtype).contiguous()
                ctypes.memmove(place, given.data_ptr(), given.nbytes)
            if lib.ggml_graph_compute(graph, ctypes.byref(plan)):
                raise RuntimeError("ggml_graph_compute failed")
            ctypes.memmove(out.data_ptr(), lib.ggml_get_data(total), out.nbytes)
            return out

        run.keep = self, work  # type: ignore[attr-defined]
        return run

    def rest(self) -> None:
        """Send its threads to sleep until the next call; else they spin for a tenth of a second."""
        self._lib.ggml_threadpool_pause(self._pool)

    def __del__(self) -> None:
        self._lib.ggml_threadpool_free(self._pool)
        self._lib.ggml_free(self._context)


def _library() -> Any:
    import libggml  # type: ignore[import-not-found]

    folder = Path(libggml.__file__).parent / "lib64"
    for name in ("libggml-base.so", "libggml-cpu.so"):
        lib: Any = ctypes.CDLL(str(folder / name))
    base: Any = ctypes.CDLL(str(folder / "libggml-base.so"))
    for owner, signatures in ((base, _BASE), (lib, _CPU)):
        for name, (result, *arguments) in signatures.items():
            function = getattr(owner, name)
            function.restype, function.argtypes = result, arguments
            setattr(lib, name, function)
    lib.ggml_cpu_init()
    return lib


_BASE = {
    "ggml_init": (_pointer, _InitParams),
    "ggml_free": (None, _pointer),
    "ggml_new_tensor_2d": (_pointer, _pointer, _int, _long, _long),
    "ggml_new_tensor_3d": (_pointer, _pointer, _int, _long, _long, _long),
    "ggml_get_data": (_pointer, _pointer),
    "ggml_nbytes": (_size, _pointer),
    "ggml_quantize_chunk": (_size, _int, _pointer, _pointer, _long, _long, _long, _pointer),
    "ggml_mul_mat_id": (_pointer, _pointer, _pointer, _pointer, _pointer),
    "ggml_swiglu_split": (_pointer, _pointer, _pointer, _pointer),
    "ggml_mul": (_pointer, _pointer, _pointer, _pointer),
    "ggml_add": (_pointer, _pointer, _pointer, _pointer),
    "ggml_view_2d": (_pointer, _pointer, _pointer, _long, _long, _size, _size),
    "ggml_new_graph": (_pointer, _pointer),
    "ggml_build_forward_expand": (None, _pointer, _pointer),
    "ggml_threadpool_params_default": (_PoolParams, _int),
}
_CPU = {
    "ggml_cpu_init": (None,),
    "ggml_threadpool_new": (_pointer, _pointer),
    "ggml_threadpool_free": (None, _pointer),
    "ggml_threadpool_pause": (None, _pointer),
    "ggml_graph_plan": (_Plan, _pointer, _int, _pointer),
    "ggml_graph_compute": (_int, _pointer, _pointer),
}

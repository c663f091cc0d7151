"""Run native kernels in a program of their own that the address and UB sanitizers watch."""

import ctypes
import functools
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from moecc.codegen.native import build, call, emit
from moecc.codegen.spec import KernelSpec

FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
_HOLDER = tempfile.TemporaryDirectory(prefix="moecc-sanitized-")


class Found(AssertionError):
    """What a sanitizer said."""


def run_sanitized(
    spec: KernelSpec | tuple[Any, ...],
    *tensors: Any,
    change: tuple[str, str] | None = None,
) -> Any:
    """Run a kernel under the sanitizers, with `change` made in its source; give its output.

    A tuple is an emitter and what it is given. Raises `Found` when a sanitizer finds something.
    """
    emitter, *given = spec if isinstance(spec, tuple) else (emit, spec)
    name = emitter.__name__.replace("emit", "experts").rpartition(".")[2]
    buffers: dict[int, torch.Tensor] = {}

    def address(tensor: torch.Tensor | None) -> int | None:
        if tensor is None or not tensor.numel():
            return None
        return buffers.setdefault(tensor.data_ptr(), tensor).data_ptr()

    def load(source: str) -> Callable[..., int]:
        if change is not None:
            assert change[0] in source
            source = source.replace(*change)
        flags = f"{os.environ.get('CXXFLAGS', '')} {FLAGS}"
        return functools.partial(_call, _library(source, flags), f"moecc_{name}", buffers)

    caller = call if emitter is emit else emitter
    with mock.patch.object(caller, "address", address), mock.patch.object(emitter, "_load", load):
        return emitter.emit(*given).run(*tensors)


def _call(library: Path, name: str, buffers: dict[int, torch.Tensor], reference: object) -> int:
    layer: ctypes.Structure = reference._obj  # what ctypes.byref was given
    values = [(name, value or 0) for name, _ in layer._fields_ for value in _words(layer, name)]
    words = [
        _buffer(buffers[value]) if value in buffers else struct.pack("qq", -1, value)
        for _, value in values
    ]
    folder = Path(_HOLDER.name)
    case, result = folder / "case", folder / "result"
    case.write_bytes(b"".join(words))
    done = subprocess.run(
        [_program(), library, name, case, result],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"},
    )
    if done.returncode:
        raise Found(f"exit {done.returncode}: {done.stderr[:2000]}")
    after = result.read_bytes()
    for name, place in values:
        if place in buffers:
            size = len(_buffer(buffers[place])) - struct.calcsize("qq")
            if name == "out":
                ctypes.memmove(place, after, size)
            after = after[size:]
    return 0


def _words(layer: ctypes.Structure, name: str) -> list[int | None]:
    """Give the numbers and pointers that a field holds, one or an array of them."""
    field = getattr(layer, name)
    return [*field] if isinstance(field, ctypes.Array) else [field]


def _buffer(tensor: torch.Tensor) -> bytes:
    """Give all bytes from a tensor's first to its last element, and how they are aligned."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    size = (1 + sum((length - 1) * step for length, step in steps)) * tensor.itemsize
    place = tensor.data_ptr()
    return struct.pack("qq", size, place % 16) + ctypes.string_at(place, size)


@functools.cache
def _library(source: str, flags: str) -> Path:
    """Build with sanitizers; the compiler is found without, since its probe is loaded here."""
    compiler = build.find_compiler()
    with mock.patch.dict(os.environ, CXXFLAGS=flags):
        return build.build(source, compiler)


@functools.cache
def _program() -> Path:
    program = Path(_HOLDER.name) / "call_kernel"
    source = Path(__file__).with_name("call_kernel.cpp")
    command = [*build.find_compiler(), "-std=c++17", *FLAGS.split(), "-o", program, source, "-ldl"]
    subprocess.run(command, check=True)
    return program

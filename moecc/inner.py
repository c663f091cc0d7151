"""The inner backend: how it is called, when it has to see a whole graph, what its cache depends on.

Inductor keeps what it compiles by the graph, torch's version and its own settings. What our
operators mean to it (shapes, strides, what they write to) is ours to add, and the CPU, whose
instructions its loops are written in: a fingerprint of both is one of the settings, so that nothing
compiled by another version or for another CPU is taken.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from moecc import __version__, runtime
from moecc.codegen.native.build import cpu_identity
from moecc.vector_isa import find_vector_isa

_LEAST_CHUNK = 2**14
"""Elements of a loop of inductor's that are worth a thread, some microseconds of work: waking one
takes as long, and much longer beside other work. A decoding step has many loops below that."""
_TAKES_FAKES = ("eager", "aot_eager", "inductor")
"""Inner backends that compile for fake tensors, as a part's inputs are while nothing has run."""


def inner_compiler(name: str, mode: str | None, on_gpu: bool) -> Callable[..., Callable[..., Any]]:
    """Look the inner backend up; inductor has torch.compile's mode as options."""
    compiler: Callable[..., Callable[..., Any]] = lookup_backend(name)
    if name != "inductor":
        return compiler
    from torch._inductor import config, list_mode_options  # only a compiled graph needs it

    ours: dict[str, Any] = {
        "cpp.min_chunk_size": max(_LEAST_CHUNK, config.cpp.min_chunk_size),
        "unsafe_marked_cacheable_functions": config.unsafe_marked_cacheable_functions
        | {"torch.ops.moecc": fingerprint()},
    }
    patches = ours | (list_mode_options(mode) if mode else {})
    return partial(compiler if on_gpu else _probed(compiler), config_patches=patches)


def _probed(compiler: Callable[..., Callable[..., Any]]) -> Callable[..., Callable[..., Any]]:
    def compile_on_cpu(gm: GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        find_vector_isa()
        return compiler(gm, inputs, **settings)

    return compile_on_cpu


def why_whole(inner: str, mode: str | None, on_gpu: bool) -> str:
    """Say why the inner backend should see the whole graph at once; empty if parts will do."""
    if inner not in _TAKES_FAKES:
        return f"inner={inner!r} may need tensors with values, which parts of a graph do not have"
    if inner != "inductor":
        return ""
    from torch._inductor import config, list_mode_options  # only a compiled graph needs it

    modes: dict[str, Any] = list_mode_options(mode) if mode else {}
    if on_gpu and modes.get("triton.cudagraphs", config.triton.cudagraphs):
        return "CUDA graphs record a whole graph"
    return "inductor freezes weights" if config.freezing else ""


@cache
def fingerprint() -> str:
    """Give a digest of our version, the code that says what our operators are, and the CPU."""
    files = sorted(Path(str(runtime.__file__)).parent.glob("*.py"))
    told = (__version__, cpu_identity(), torch.backends.cpu.get_cpu_capability())
    parts = (*(one.encode() for one in told), *(one.read_bytes() for one in files))
    return sha256(b"\0".join(parts)).hexdigest()

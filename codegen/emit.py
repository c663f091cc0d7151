"""Choose the emitter of a kernel: Triton on CUDA devices, native C++ on CPUs, torch elsewhere."""

from collections.abc import Callable, Mapping
from functools import cache

from moecc.codegen import reference
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.runtime.errors import BuildError, UnsupportedSpec

PREFERRED: Mapping[str, str] = {"cuda": "triton", "cpu": "native"}
"""The emitter that `kernels="auto"` means, by device type."""


@cache
def choose(spec: KernelSpec, emitter: str = "auto") -> tuple[Kernel, tuple[str, ...]]:
    """Emit a spec's kernel, with the torch definition as the last resort.

    Returns the kernel and the reasons of the emitters that declined, which belong in the report.
    """
    wanted = PREFERRED.get(spec.device, "torch") if emitter == "auto" else emitter
    try:
        return _emitter(wanted)(spec), ()
    except (UnsupportedSpec, BuildError) as error:
        return reference.emit(spec), (f"{wanted} kernels declined, torch runs instead: {error}",)


def _emitter(name: str) -> Callable[[KernelSpec], Kernel]:
    """Import an emitter on first use: each has a toolchain behind it."""
    if name == "native":
        from moecc.codegen.native.emit import emit

        return emit
    if name == "triton":
        from moecc.codegen.triton_emitter import emit

        return emit
    return reference.emit

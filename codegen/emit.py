"""Choose the emitter of a kernel: Triton on CUDA devices, native C++ on CPUs, torch elsewhere."""

from collections.abc import Callable, Mapping
from functools import cache

from moecc.codegen import low_bit, reference
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.runtime.errors import BuildError, UnsupportedSpec
from moecc.runtime.schemes.scheme import Schemes

PREFERRED: Mapping[str, str] = {"cuda": "triton", "cpu": "native"}
"""The emitter that `kernels="auto"` means, by device type."""


@cache
def choose(
    spec: KernelSpec, emitter: str = "auto", schemes: Schemes | None = None
) -> tuple[Kernel, tuple[str, ...]]:
    """Emit a spec's kernel, on low-bit copies of the weights if there are schemes.

    Returns the kernel and the reasons of the emitters that declined, which belong in the report:
    weights then keep their dtype, and the torch definition is the last resort.
    """
    wanted = PREFERRED.get(spec.device, "torch") if emitter == "auto" else emitter
    declined: list[str] = []
    if schemes is not None:
        try:
            return low_bit.emit(spec, schemes, wanted), ()
        except (UnsupportedSpec, BuildError) as error:
            declined.append(f"weights are not quantized to {schemes}: {error}")
    try:
        return _emitter(wanted)(spec), tuple(declined)
    except (UnsupportedSpec, BuildError) as error:
        declined.append(f"{wanted} kernels declined, torch runs instead: {error}")
        return reference.emit(spec), tuple(declined)


def _emitter(name: str) -> Callable[[KernelSpec], Kernel]:
    """Import an emitter on first use: each has a toolchain behind it."""
    if name == "native":
        from moecc.codegen.native.emit import emit

        return emit
    if name == "triton":
        from moecc.codegen.triton_emitter import emit

        return emit
    return reference.emit

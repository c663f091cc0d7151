"""Choose the emitter of a kernel: Triton on CUDA devices, native C++ on CPUs, torch elsewhere."""

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch

from moecc.codegen import low_bit, reference
from moecc.codegen.router_spec import RouterKernel, RouterSpec
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.runtime import ops
from moecc.runtime.errors import BuildError, UnsupportedSpec
from moecc.runtime.ops import AddExpertsFn
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
    wanted = _preferred(spec, emitter)
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


def choose_router(device: str, emitter: str) -> Callable[[RouterSpec], RouterKernel] | None:
    """Give what writes the kernels of routers on a device; None where torch computes them."""
    wanted = PREFERRED.get(device, "torch") if emitter == "auto" else emitter
    if wanted != "triton" or device != "cuda":
        return None
    from moecc.codegen.triton_router import emit as emit_router

    return emit_router


_specs: dict[str, KernelSpec] = {}


def install_kernel(kernel: Kernel, emitter: str = "auto") -> None:
    """Make a kernel callable from graphs, also for experts that are not all in memory."""
    _specs[kernel.key] = kernel.spec
    ops.install(kernel.key, kernel.run, partial(adder_of, kernel.spec, emitter))


def spec_of(key: str) -> KernelSpec:
    """Give the spec of a kernel that was installed, by its key in graphs."""
    return _specs[key]


@cache
def adder_of(spec: KernelSpec, emitter: str, schemes: Schemes | None) -> AddExpertsFn:
    """Give the kernel that adds a block's experts group by group, packed if in schemes.

    Raises `UnsupportedSpec` when no emitter of the device has one.
    """
    if schemes is None:
        kernel, declined = choose(spec, emitter)
    else:
        kernel, declined = choose_packed(spec, schemes, emitter)
    if kernel.add is None:
        why = "; ".join(declined) or f"{kernel.emitter} kernels read no experts from slots"
        raise UnsupportedSpec(f"experts of {spec.key} cannot be left out of memory: {why}")
    if schemes is None or not (spec.bias and spec.interleaved):
        return kernel.add
    return partial(_add_with_ordered_bias, kernel.add, spec)


def choose_packed(
    spec: KernelSpec, schemes: Schemes, emitter: str
) -> tuple[Kernel, tuple[str, ...]]:
    """Emit the kernel of weights that are packed already, as `choose` does; torch reads all."""
    wanted = _preferred(spec, emitter)
    try:
        return low_bit.packed_kernel(spec, schemes, wanted), ()
    except (UnsupportedSpec, BuildError) as error:
        return low_bit.packed_kernel(spec, schemes, "torch"), (str(error),)


def _add_with_ordered_bias(
    add: AddExpertsFn, spec: KernelSpec, *arguments: torch.Tensor | None
) -> None:
    *before, bias, down_bias, up = arguments
    add(*before, low_bit.packed_bias(spec, bias), down_bias, up)


def _preferred(spec: KernelSpec, emitter: str) -> str:
    return PREFERRED.get(spec.device, "torch") if emitter == "auto" else emitter


def _emitter(name: str) -> Callable[[KernelSpec], Kernel]:
    """Import an emitter on first use: each has a toolchain behind it."""
    if name == "native":
        from moecc.codegen.native.emit import emit

        return emit
    if name == "triton":
        from moecc.codegen.triton_emitter import emit

        return emit
    return reference.emit

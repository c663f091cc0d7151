"""Run a block whose weights the model holds in full on low-bit copies of them.

Copies are packed on the first call, expert by expert, and stay beside the model's own weights. The
kernel takes the tensors of the block as they are, in any layout that a spec can say.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moecc.codegen import reference
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.runtime.errors import UnsupportedSpec
from moecc.runtime.schemes.copies import Copies
from moecc.runtime.schemes.packing import pack_experts
from moecc.runtime.schemes.scheme import Schemes

Tensors = Sequence[torch.Tensor | None]
"""gate_up, down, gate_up_bias, down_bias, up and learned, as in `ExpertsFn`."""


def packed_kernel(spec: KernelSpec, schemes: Schemes, emitter: str) -> Kernel:
    """Make the kernel that computes `spec` on packed weights (`packed_tensors`).

    Raises `UnsupportedSpec` when the emitter has none, and what the emitter raises.
    """
    layout = {"interleaved": False, "transposed": False, "down_transposed": False}
    packed = replace(spec, schemes=schemes, split=spec.gated, **layout)
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedSpec(f"{spec.dtype} weights are not quantized")
    if emitter == "native":
        from moecc.codegen.native.emit import emit as emit_native

        return emit_native(packed)
    if emitter == "triton":
        from moecc.codegen.triton_emitter import emit as emit_triton

        return emit_triton(packed)
    return reference.emit(packed)


def emit(spec: KernelSpec, schemes: Schemes, emitter: str) -> Kernel:
    """Make the kernel that computes `spec` with schemes, on copies of full weights.

    Raises what `packed_kernel` does.
    """
    kernel = packed_kernel(spec, schemes, emitter)
    copies = Copies(lambda tensors: packed_tensors(spec, schemes, tensors))

    def run(
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        up: torch.Tensor | None = None,
        learned: torch.Tensor | None = None,
        **shared: torch.Tensor | None,
    ) -> torch.Tensor:
        low_bit = copies.of((gate_up, down, gate_up_bias, down_bias, up, learned))
        return kernel.run(hidden, ids, weights, *low_bit, **shared)

    return Kernel(spec=spec, emitter=f"{kernel.emitter} {schemes}", run=run, source=kernel.source)


_Optional = torch.Tensor | None


def packed_tensors(
    spec: KernelSpec,
    schemes: Schemes,
    tensors: Tensors,
    importance: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, _Optional, _Optional, _Optional, _Optional]:
    """Pack the matrices of a block, gate and up apart; biases go in the same order.

    `importance` [H] and [I] is that of `schemes.packing.quantize`, for all experts given.
    """
    of_first, of_second = importance or (None, None)
    gate_up, down, bias, down_bias, up, learned = tensors
    assert gate_up is not None
    assert down is not None
    with torch.no_grad():
        first = gate_up.mT if spec.transposed else gate_up
        bias = packed_bias(spec, bias)
        if spec.gated and not spec.split:
            first, up = _halves(spec, first)
        elif up is not None and spec.transposed:
            up = up.mT
        second = down.mT if spec.down_transposed else down
        return (
            pack_experts(first, schemes.first, of_first),
            pack_experts(second, schemes.second, of_second),
            bias,
            down_bias,
            None if up is None else pack_experts(up, schemes.first, of_first),
            learned,
        )


def packed_bias(spec: KernelSpec, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Order the first product's bias [E, rows] as packed kernels do: gates, then ups."""
    return torch.cat(_halves(spec, bias), dim=1) if spec.interleaved and bias is not None else bias


def _halves(spec: KernelSpec, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Part gates [E, I, ..] and ups [E, I, ..] of [E, 2I, ..]."""
    if spec.interleaved:
        return rows[:, ::2], rows[:, 1::2]
    gate, up = rows.chunk(2, dim=1)
    return gate, up

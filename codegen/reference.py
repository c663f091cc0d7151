"""Define the experts kernel with torch.

The definition that every emitter is tested against, and what runs where there is no compiler.
"""

import inspect
from typing import Protocol, cast

import torch

from moecc.codegen.activation import evaluate
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.runtime.schemes.packing import unpack_experts


class GateUpLayout(Protocol):
    """How the outputs of a first product lie."""

    @property
    def gated(self) -> bool:
        """Half of them are gates."""
        ...

    @property
    def interleaved(self) -> bool:
        """Gates and ups alternate."""
        ...


def split_gate_up(rows: torch.Tensor, spec: GateUpLayout) -> dict[str, torch.Tensor]:
    """Name the halves of the first product [..., 2I]: `gate` and `up`, or `x` if not gated."""
    if not spec.gated:
        return {"x": rows}
    if spec.interleaved:
        return {"gate": rows[..., ::2], "up": rows[..., 1::2]}
    gate, up = rows.chunk(2, dim=-1)
    return {"gate": gate, "up": up}


def experts_torch(
    spec: KernelSpec,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    up: torch.Tensor | None = None,
    learned: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the block one active expert at a time; shapes as in `ExpertsFn`.

    Products run in the weights' dtype, the weighted sum over k in float32 or wider.
    """
    tokens, active = ids.shape
    if spec.scheme is not None:
        gate_up, down, up = _unpacked(spec, gate_up, down, up)
    wide = torch.promote_types(spec.dtype, torch.float32)
    terms = torch.zeros(tokens, active, hidden.shape[-1], dtype=wide, device=hidden.device)
    for expert in cast(list[int], ids.unique().tolist()):
        if not 0 <= expert < spec.experts:
            continue
        token, slot = torch.where(ids == expert)
        first, second = gate_up[expert], down[expert]
        if up is not None:
            first = torch.cat([first, up[expert]], dim=1 if spec.transposed else 0)
        if not spec.transposed:
            first = first.T
        if not spec.down_transposed:
            second = second.T
        rows = hidden[token].to(spec.dtype) @ first
        if gate_up_bias is not None:
            rows = rows + gate_up_bias[expert]
        leaves = split_gate_up(rows, spec)
        if learned is not None:
            leaves["learned"] = learned[expert]
        out = evaluate(spec.activation, **leaves).to(spec.dtype) @ second
        if down_bias is not None:
            out = out + down_bias[expert]
        terms[token, slot] = out.to(wide) * weights[token, slot, None].to(wide)
    return terms.sum(dim=1).to(hidden.dtype)


def _unpacked(
    spec: KernelSpec, gate_up: torch.Tensor, down: torch.Tensor, up: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Give what packed weights stand for, in the model's dtype; all experts at once."""
    assert spec.scheme is not None
    first = (spec.experts, spec.intermediate, spec.hidden)
    second = (spec.experts, spec.hidden, spec.intermediate)
    gate, low = (
        unpack_experts(packed, shape, spec.scheme).to(spec.dtype)
        for packed, shape in ((gate_up, first), (down, second))
    )
    wide = None if up is None else unpack_experts(up, first, spec.scheme).to(spec.dtype)
    return gate, low, wide


def emit(spec: KernelSpec) -> Kernel:
    """Bind the definition to a spec."""

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
    ) -> torch.Tensor:
        vectors = (gate_up_bias, down_bias)
        return experts_torch(spec, hidden, ids, weights, gate_up, down, *vectors, up, learned)

    return Kernel(spec=spec, emitter="torch", run=run, source=inspect.getsource(experts_torch))

"""Define the experts kernel with torch.

The definition that every emitter is tested against, and what runs where there is no compiler.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
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


def add_experts_torch(
    spec: KernelSpec,
    onto: torch.Tensor,
    slots: torch.Tensor | None,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    up: torch.Tensor | None = None,
    learned: torch.Tensor | None = None,
    *,
    seen: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> None:
    """Add the block's output, one active expert at a time, ascending; shapes as in `ExpertsFn`.

    Products run in the weights' dtype, the weighted sum in that of `onto`. Expert `e` lies at
    `slots[e]` of the weights, at `e` without slots. `seen` is called with each expert and what its
    two products multiply.
    """
    for expert in cast(list[int], ids.unique().tolist()):
        slot = expert if slots is None or not 0 <= expert < spec.experts else int(slots[expert])
        if not 0 <= expert < spec.experts or slot < 0:
            continue
        token, choice = torch.where(ids == expert)
        first, second, wide = (
            None if one is None else one[slot : slot + 1] for one in (gate_up, down, up)
        )
        assert first is not None
        assert second is not None
        if spec.schemes is not None:
            first, second, wide = _unpacked(spec, first, second, wide)
        first = first[0] if wide is None else torch.cat([first[0], wide[0]], int(spec.transposed))
        second = second[0] if spec.down_transposed else second[0].T
        inputs = hidden[token].to(spec.dtype)
        rows = inputs @ (first if spec.transposed else first.T)
        if gate_up_bias is not None:
            rows = rows + gate_up_bias[expert]
        leaves = split_gate_up(rows, spec)
        if learned is not None:
            leaves["learned"] = learned[expert]
        activated = evaluate(spec.activation, **leaves).to(spec.dtype)
        if seen is not None:
            seen(expert, inputs, activated)
        out = activated @ second
        if down_bias is not None:
            out = out + down_bias[expert]
        onto.index_add_(0, token, out.to(onto.dtype) * weights[token, choice, None].to(onto.dtype))


def experts_torch(
    spec: KernelSpec, hidden: torch.Tensor, *inputs: torch.Tensor | None
) -> torch.Tensor:
    """Compute the block as `ExpertsFn` says; the sum over k is float32 or wider."""
    wide = torch.promote_types(spec.dtype, torch.float32)
    onto = hidden.new_zeros(hidden.shape, dtype=wide)
    add: Callable[..., None] = add_experts_torch
    add(spec, onto, None, hidden, *inputs)
    return onto.to(hidden.dtype)


def _unpacked(
    spec: KernelSpec, gate_up: torch.Tensor, down: torch.Tensor, up: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Give what packed weights stand for, in the model's dtype."""
    assert spec.schemes is not None
    first = (len(gate_up), spec.intermediate, spec.hidden)
    second = (len(down), spec.hidden, spec.intermediate)
    gate = unpack_experts(gate_up, first, spec.schemes.first).to(spec.dtype)
    low = unpack_experts(down, second, spec.schemes.second).to(spec.dtype)
    wide = None if up is None else unpack_experts(up, first, spec.schemes.first).to(spec.dtype)
    return gate, low, wide


@cache
def emit(spec: KernelSpec) -> Kernel:
    """Bind the definition to a spec."""
    return Kernel(
        spec=spec,
        emitter="torch",
        run=partial(experts_torch, spec),
        add=partial(add_experts_torch, spec),
        source=inspect.getsource(add_experts_torch),
    )

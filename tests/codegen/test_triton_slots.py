"""Experts that lie in slots: found through a table on the device, added group by group."""

import dataclasses

import pytest
import torch

from moecc.codegen.activation import GATE, LEARNED, UP, apply
from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from moecc.codegen import triton_emitter
from moecc.codegen.gpus import GPUS
from moecc.codegen.triton_costs import plans
from moecc.codegen.triton_inputs import Inputs
from tests.codegen.triton_cases import make_inputs, make_spec, tensors
from tests.codegen.triton_interpreter import interpreted

SLOTS = 3
KINDS = {
    "biased": make_spec(split=True, bias=True, experts=8, dtype=torch.bfloat16),
    "learned": make_spec(apply("mul", apply("mul", GATE, UP), LEARNED), experts=8),
}


def lend(spec: KernelSpec, x: Inputs, experts: list[int]) -> tuple[Inputs, torch.Tensor]:
    """Put experts into slots, the last one first; the other slots hold NaN."""
    table = torch.full((spec.experts,), -1)
    table[experts] = torch.arange(SLOTS - 1, SLOTS - 1 - len(experts), -1)
    held: dict[str, torch.Tensor] = {}
    for name in ("gate_up", "down", "up"):
        if (full := getattr(x, name)) is not None:
            held[name] = full.new_full((SLOTS, *full.shape[1:]), torch.nan)
            held[name][table[experts]] = full[experts]
    return dataclasses.replace(x, **held), table


@pytest.mark.parametrize("plan", [0, 1], ids=["decode", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_experts_add_up_to_the_bits_of_all_at_once(kind: str, plan: int) -> None:
    spec = KINDS[kind]
    x = make_inputs(spec, tokens=3, active=5)
    x.ids[0, 0] = -1
    kernel = triton_emitter.emit(spec, plans(spec, GPUS["sm_90"], 5)[plan])
    onto = torch.zeros(x.hidden.shape)
    with interpreted():
        whole = kernel.run(*tensors(x))
        for group in ([0, 2], [3, 4, 5], [6], [7]):  # 1 is never there
            lent, table = lend(spec, x, group)
            kernel.add(onto, table, *tensors(lent))
        x.ids[x.ids == 1] = -1
        without = kernel.run(*tensors(x))
    assert torch.equal(onto.to(spec.dtype), without)
    assert not torch.equal(whole, without)


def test_many_assignments_are_routed_by_several_programs() -> None:
    spec = make_spec(experts=8, dtype=torch.bfloat16)
    x = make_inputs(spec, 1100, active=2)
    x = dataclasses.replace(x, ids=(torch.arange(2200).view(-1, 2) * 7 + 3) % 8)
    table = torch.tensor([-1, 5, -1, 0, 2, -1, -1, 1])
    with interpreted():
        launches = triton_emitter.plan_launches(spec)
        order, tiles = triton_emitter.run_routing(launches, x.ids, 128, table)
    there = torch.isin(x.ids.flatten(), torch.where(table >= 0)[0])
    wanted = x.ids.flatten().masked_fill(~there, 99).argsort(stable=True)[: there.sum()]
    assert torch.equal(order[: there.sum()].long(), wanted)
    assert tiles[tiles[:, 0] >= 0, 0].unique().tolist() == [1, 3, 4, 7]


def test_more_experts_a_token_than_keys_of_the_plan() -> None:
    spec = make_spec(experts=50, hidden=16, intermediate=16)
    x = make_inputs(spec, tokens=1, active=40)
    with interpreted():
        out = triton_emitter.emit(spec).run(*tensors(x))
        back = dataclasses.replace(x, ids=x.ids.flip(1), weights=x.weights.flip(1))
        assert torch.equal(out, triton_emitter.emit(spec).run(*tensors(back)))


def test_a_sum_in_another_dtype_is_refused() -> None:
    spec = make_spec()
    x = make_inputs(spec, 1, active=1)
    with pytest.raises(InputError, match=r"onto is torch\.float16"):
        triton_emitter.emit(spec).add(x.hidden.half(), torch.arange(4), *tensors(x))


def test_a_table_of_another_size_is_refused() -> None:
    spec = make_spec()
    x = make_inputs(spec, 1, active=1)
    with pytest.raises(InputError, match=r"slots is \(3,\)"):
        triton_emitter.emit(spec).add(torch.zeros(1, 48), torch.arange(3), *tensors(x))

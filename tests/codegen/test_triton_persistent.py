"""Persistent kernels that read by tensor descriptor: their numbers, their plans, their refusals."""

import dataclasses

import pytest
import torch

from moecc.codegen.gpus import GPUS
from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from moecc.codegen import triton_emitter
from moecc.codegen.triton_costs import choose_plan, plans
from moecc.codegen.triton_inputs import Inputs
from moecc.codegen.triton_launches import plan_launches
from tests.codegen.test_triton_slots import lend
from tests.codegen.triton_cases import (
    STYLES,
    assert_close,
    expect,
    make_inputs,
    make_spec,
    persistent,
    tensors,
)
from tests.codegen.triton_dry_run import dry_run
from tests.codegen.triton_interpreter import interpreted

FEW = {name: dataclasses.replace(GPUS[name], sms=2) for name in ("sm_90", "sm_100", "sm_120")}
"""A program has many tiles. sm_100 gathers hidden states by descriptor, and has other warps."""
HALF = {"dtype": torch.bfloat16, "hidden": 72, "intermediate": 40}
WHOLE = [name for name, spec in STYLES.items() if not spec.split]


def run(spec: KernelSpec, x: Inputs, gpu: str = "sm_90") -> torch.Tensor:
    with interpreted():
        return persistent(plan_launches(spec, FEW[gpu]), x)


@pytest.mark.parametrize("style", WHOLE)
def test_agrees_with_the_definition(style: str) -> None:
    spec = dataclasses.replace(STYLES[style], **HALF)
    x = make_inputs(spec, tokens=5, active=2)
    assert_close(run(spec, x), expect(spec, x), spec.dtype)


@pytest.mark.parametrize("gpu", FEW)
def test_a_program_takes_every_further_tile(gpu: str) -> None:
    """Several columns and rows of tiles, the last of each not full."""
    spec = make_spec(dtype=torch.float16, hidden=264, intermediate=328, experts=3)
    x = make_inputs(spec, tokens=150, active=2)
    x.ids[0] = torch.tensor([-1, 3])
    assert_close(run(spec, x, gpu), expect(spec, x), spec.dtype)


@pytest.mark.parametrize("gpu", ["sm_90", "sm_100"])
def test_hidden_states_may_be_wider_than_the_weights(gpu: str) -> None:
    spec = make_spec(**HALF)
    x = make_inputs(spec, tokens=2, active=2)
    x = dataclasses.replace(x, hidden=x.hidden.float())
    out = run(spec, x, gpu)
    assert out.dtype == torch.float32
    assert (out - expect(spec, x)).norm() < 1e-2 * out.norm()


def test_experts_that_share_no_tile_do_not_meet() -> None:
    """Rows behind an expert's last one are read and multiplied, and are another's."""
    spec = make_spec(**HALF)
    x = make_inputs(spec, tokens=3, active=2)
    x.hidden[1, 5] = torch.nan
    out = run(spec, x)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_groups_of_experts_in_slots_add_up_to_the_bits_of_all_at_once() -> None:
    spec = make_spec(**HALF, experts=8, bias=True)
    x = make_inputs(spec, tokens=4, active=4)
    plan = plans(spec, GPUS["sm_90"], 4)[-1]
    assert str(plan) == "persistent, 128 rows a tile"
    kernel = triton_emitter.emit(spec, plan)
    onto = torch.zeros(x.hidden.shape)
    with interpreted():
        whole = kernel.run(*tensors(x))
        for group in ([0, 1, 2], [3, 4], [5, 6, 7]):
            lent, table = lend(spec, x, group)
            kernel.add(onto, table, *tensors(lent))
    assert torch.equal(onto.to(spec.dtype), whole)


def test_no_token_count_compiles_anew() -> None:
    spec = make_spec(**HALF, experts=14)
    with dry_run(100) as launches:
        for tokens, active in ((1, 1), (9, 3), (16, 4), (17, 1), (40, 2)):
            persistent(plan_launches(spec, FEW["sm_100"]), make_inputs(spec, tokens, active))
    assert sorted(launches.compiled) == [
        *("persistent_down", "persistent_gate_up", "reduce_terms", "route")
    ]
    grids = {grid for name, grid in launches.launched if name.startswith("persistent")}
    assert grids == {(2, 1, 1)}


@pytest.mark.parametrize(
    "change",
    [{"dtype": torch.float32}, {"split": True}, {"hidden": 99}, {"intermediate": 77}],
    ids=str,
)
def test_what_descriptors_cannot_read_has_no_such_plan(change: dict[str, object]) -> None:
    spec = make_spec(**HALF)
    for target, gpu in GPUS.items():
        has = target in ("sm_90", "sm_100", "sm_120")
        assert plans(spec, gpu, 2)[-1].persistent == has
        assert not plans(dataclasses.replace(spec, **change), gpu, 2)[-1].persistent


def test_weights_that_are_not_aligned_take_another_plan() -> None:
    spec = make_spec(dtype=torch.bfloat16, hidden=1024, intermediate=1024, experts=2)
    x = make_inputs(spec, tokens=4096, active=1)
    assert choose_plan(spec, GPUS["sm_90"], 4096, 1).persistent
    down = torch.cat([x.down.new_zeros(1), x.down.flatten()])[1:].view(x.down.shape)
    odd = dataclasses.replace(x, down=down)
    with dry_run(90) as launches:
        triton_emitter.emit(spec).run(*tensors(odd))
    assert "grouped_down" in launches.compiled
    plan = plans(spec, GPUS["sm_90"], 1)[-1]
    with pytest.raises(InputError, match="multiple of 16 bytes"):
        triton_emitter.emit(spec, plan).run(*tensors(odd))

"""Each product in a layout of its own, in Triton.

Every layout with every way of writing gate and up, and each of the two with every dtype: pairs, of
which a load or a store depends on no more. The three together are not all run.
"""

import dataclasses

import pytest
import torch

from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from moecc.codegen import triton_emitter
from moecc.codegen.gpus import GPUS
from moecc.codegen.triton_costs import plans
from moecc.codegen.triton_launches import plan_launches
from tests.codegen.triton_cases import (
    GPT_OSS,
    INPUT_MAJOR,
    RELU2,
    TOLERANCE,
    assert_close,
    decode,
    expect,
    grouped,
    make_inputs,
    make_spec,
    tensors,
)
from tests.codegen.triton_dry_run import dry_run
from tests.codegen.triton_interpreter import interpreted

LAYOUTS = {
    "both output-major": {},
    "down input-major": {"down_transposed": True},
    "gate and up input-major": {"transposed": True},
    "both input-major": INPUT_MAJOR,
}
MIXED = ("down input-major", "gate and up input-major")
KINDS = {
    "halves": make_spec(),
    "two tensors": make_spec(split=True, bias=True),
    "interleaved": make_spec(GPT_OSS, interleaved=True, bias=True),
    "ungated": make_spec(RELU2, gated=False),
}


PAIRS = [
    (layout, list(TOLERANCE)[(row + column) % len(TOLERANCE)], kind)
    for row, layout in enumerate(LAYOUTS)
    for column, kind in enumerate(KINDS)
]


def spec_of(layout: str, kind: str, **changes: object) -> KernelSpec:
    return dataclasses.replace(KINDS[kind], **LAYOUTS[layout], **changes)


@pytest.mark.parametrize(("layout", "dtype", "kind"), PAIRS, ids=str)
def test_both_algorithms_agree_with_the_definition(
    layout: str, dtype: torch.dtype, kind: str
) -> None:
    # Neither size is a multiple of a block, and I is not one of 8.
    spec = spec_of(layout, kind, dtype=dtype, hidden=72, intermediate=43)
    x = make_inputs(spec, tokens=5, active=2)
    launches, expected = plan_launches(spec), expect(spec, x)
    with interpreted():
        assert_close(decode(launches, x), expected, dtype)
        assert_close(grouped(launches, x, 16), expected, dtype)


@pytest.mark.parametrize("layout", MIXED)
def test_square_matrices_are_read_in_the_layout_that_the_spec_says(layout: str) -> None:
    """No shape tells the layouts apart where H = I: the numbers must."""
    spec = spec_of(layout, "halves", hidden=48, intermediate=48)
    x = make_inputs(spec, tokens=3, active=2)
    plain = dataclasses.replace(spec, transposed=False, down_transposed=False)
    turned = dataclasses.replace(
        x,
        gate_up=x.gate_up.mT if spec.transposed else x.gate_up,
        down=x.down.mT if spec.down_transposed else x.down,
    )
    with interpreted():
        out = decode(plan_launches(spec), x)
    assert_close(out, expect(plain, turned), spec.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_product_is_compiled_as_where_both_lie_like_it(dtype: torch.dtype, kind: str) -> None:
    """So nothing has to be said of a mixed spec's registers, tiles and reads."""
    plans = {
        layout: plan_launches(spec_of(layout, kind, dtype=dtype, hidden=256, intermediate=192))
        for layout in LAYOUTS
    }
    output_major, input_major = plans["both output-major"], plans["both input-major"]
    assert output_major.decode_down != input_major.decode_down
    assert output_major.decode_gate_up != input_major.decode_gate_up
    for layout, first, second in (
        ("down input-major", output_major, input_major),
        ("gate and up input-major", input_major, output_major),
    ):
        plan = plans[layout]
        assert plan.decode_gate_up == first.decode_gate_up
        assert plan.decode_down == second.decode_down
        for height, by_height in plan.grouped.items():
            assert by_height.gate_up == first.grouped[height].gate_up
            assert by_height.down == second.grouped[height].down


@pytest.mark.parametrize("layout", MIXED)
def test_no_token_count_compiles_anew(layout: str) -> None:
    # 14 experts: 17 tokens make 16 tiles, and triton would like to know that 16 divides 16.
    spec = spec_of(layout, "two tensors", dtype=torch.bfloat16, experts=14)
    with dry_run(90) as launches:
        for plan in plans(spec, GPUS["sm_90"], 1)[:2]:
            kernel = triton_emitter.emit(spec, plan)
            for tokens, active in ((1, 1), (1, 4), (9, 3), (16, 4), (17, 1), (40, 2)):
                kernel.run(*tensors(make_inputs(spec, tokens, active)))
    assert len(launches.compiled) == len(set(launches.compiled)) == 6


@pytest.mark.parametrize("name", ["gate_up", "up", "down"])
@pytest.mark.parametrize("layout", MIXED)
def test_a_product_in_the_layout_of_the_other_is_named(layout: str, name: str) -> None:
    spec = spec_of(layout, "two tensors")
    x = make_inputs(spec, tokens=3, active=2)
    x = dataclasses.replace(x, **{name: getattr(x, name).mT.contiguous()})
    with pytest.raises(InputError, match=f"^{name} is"):
        triton_emitter.emit(spec).run(*tensors(x))

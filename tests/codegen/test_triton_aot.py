"""What the Triton kernels compile to, for GPUs that are not here."""

import dataclasses
import math

import pytest
import torch

from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import OptionError

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from moecc.codegen import aot, triton_emitter
from moecc.codegen.gpus import GPUS
from moecc.codegen.triton_costs import plans
from moecc.codegen.triton_launches import Launch, Launches, plan_launches
from tests.codegen.triton_cases import (
    INPUT_MAJOR,
    RELU2,
    STYLES,
    make_inputs,
    make_spec,
    tensors,
)
from tests.codegen.triton_dry_run import dry_run

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
QWEN3 = make_spec(hidden=2048, intermediate=768, experts=128, dtype=torch.bfloat16)
REAL = {
    "gpt-oss": dataclasses.replace(
        STYLES["gpt-oss"], hidden=2880, intermediate=2880, experts=32, dtype=torch.bfloat16
    ),
    "mixtral": dataclasses.replace(QWEN3, hidden=4096, intermediate=14336, experts=8),
    "nemotron": dataclasses.replace(
        QWEN3, hidden=2688, intermediate=1856, activation=RELU2, gated=False
    ),
    "float16-transposed": dataclasses.replace(QWEN3, dtype=torch.float16, **INPUT_MAJOR),
    "dbrx": dataclasses.replace(
        QWEN3, hidden=6144, intermediate=10752, experts=16, split=True, down_transposed=True
    ),
    "float32-dbrx": dataclasses.replace(
        QWEN3, dtype=torch.float32, split=True, down_transposed=True
    ),
    "first-transposed": dataclasses.replace(QWEN3, transposed=True),
    "mixtral-split": dataclasses.replace(
        QWEN3, hidden=4096, intermediate=14336, experts=8, split=True
    ),
    "float32-split": dataclasses.replace(QWEN3, dtype=torch.float32, split=True),
    "float32-split-transposed": dataclasses.replace(
        QWEN3, dtype=torch.float32, split=True, **INPUT_MAJOR
    ),
    "odd-split": dataclasses.replace(
        STYLES["split"], hidden=99, intermediate=77, dtype=torch.float16
    ),
    "float32": dataclasses.replace(QWEN3, dtype=torch.float32),
    "odd": dataclasses.replace(STYLES["swiglu"], hidden=99, intermediate=77, dtype=torch.float16),
    "odd-gpt-oss": dataclasses.replace(
        STYLES["gpt-oss"], hidden=99, intermediate=77, dtype=torch.bfloat16
    ),
    "float32-gpt-oss": dataclasses.replace(STYLES["gpt-oss"], hidden=2880, intermediate=2880),
}


def check_machine_code(spec: KernelSpec, target: str) -> None:
    launches = plan_launches(spec, GPUS[target])
    # The tile height is only a number to these: one of them stands for all.
    heights = list(launches.grouped.values())
    same = {id(launch) for rest in heights[1:] for launch in (rest.route, rest.place_chunks)}
    for launch in launches.every():
        if id(launch) in same:
            continue
        resources = aot.compile_kernel(spec, launch, target)
        assert resources.spilled == 0, resources
        assert resources.fits, resources
        if launch in products(launches) and spec.dtype != torch.float32:
            sides = (launch.constants["BLOCK_M"], launch.constants["BLOCK_N"])
            wide = GPUS[target].tensor_cores if max(sides) >= 64 else "HMMA"
            assert wide in resources.instructions, resources
            assert ("UTMALDG" in resources.instructions) == bool(launch.descriptors), resources
        if "decode" in resources.kernel and spec.hidden % 16 == 0:
            assert resources.instructions["LDG.128"] >= 2, resources


def products(launches: Launches) -> list[Launch]:
    every = (*launches.grouped.values(), *filter(None, (launches.persistent,)))
    return [launch for one in every for launch in (one.gate_up, one.down)]


@pytest.mark.parametrize("target", TARGETS[:3])
def test_a_second_pointer_spills_nothing_and_reads_as_widely(target: str) -> None:
    split = dataclasses.replace(QWEN3, split=True)
    for wide in ("LDG.128", "LDGSTS.128"):
        loads: list[int] = []
        for spec in (QWEN3, split):
            launches = plan_launches(spec, GPUS[target])
            decode = wide == "LDG.128"
            launch = launches.decode_gate_up if decode else launches.grouped[16].gate_up
            resources = aot.compile_kernel(spec, launch, target)
            assert resources.spilled == 0, resources
            loads.append(resources.instructions[wide])
        assert loads[0] == loads[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REAL)
def test_machine_code_of_every_style(name: str, target: str) -> None:
    check_machine_code(REAL[name], target)


@pytest.mark.parametrize(("hidden", "intermediate"), [(104, 72), (99, 77)])
def test_sizes_that_are_no_multiple_of_a_block(hidden: int, intermediate: int) -> None:
    spec = make_spec(hidden=hidden, intermediate=intermediate, dtype=torch.bfloat16)
    launches = plan_launches(spec)
    gemms = (launches.grouped[64].gate_up, launches.grouped[64].down)
    for launch in (launches.decode_gate_up, launches.decode_down, *gemms):
        assert aot.compile_kernel(spec, launch, "sm_90").spilled == 0


def test_relu_and_clamps_pass_nan_on() -> None:
    """Which the interpreter cannot show: numpy's minimum and maximum always do."""
    for style in ("relu2", "gpt-oss"):
        launches = plan_launches(STYLES[style])
        instructions = aot.compile_kernel(
            STYLES[style], launches.decode_gate_up, "sm_90"
        ).instructions
        assert instructions["FMNMX"] == instructions["FMNMX.NAN"] > 0


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(OptionError, match="sm_10"):
        aot.compile_kernel(QWEN3, plan_launches(QWEN3).reduce_terms, "sm_10")


@pytest.mark.parametrize("split", [False, True], ids=["one tensor", "two"])
def test_no_token_count_compiles_anew(split: bool) -> None:
    # 14 experts: 17 tokens make 16 tiles, and triton would like to know that 16 divides 16.
    spec = make_spec(dtype=torch.bfloat16, experts=14, split=split)
    with dry_run(90) as launches:
        for plan in plans(spec, GPUS["sm_90"], 1)[:2]:
            kernel = triton_emitter.emit(spec, plan)
            for tokens, active in ((1, 1), (1, 4), (5, 1), (9, 3), (16, 4), (17, 1), (40, 2)):
                kernel.run(*tensors(make_inputs(spec, tokens, active)))
    assert sorted(launches.compiled) == [
        "decode_down",
        "decode_gate_up",
        "grouped_down",
        "grouped_gate_up",
        "reduce_terms",
        "route",
    ]


def test_the_grid_covers_every_tile_that_there_may_be() -> None:
    spec = dataclasses.replace(QWEN3, experts=4)
    plan = plans(spec, GPUS["sm_80"], 2)[2]
    with dry_run(80) as launches:
        triton_emitter.emit(spec, plan).run(*tensors(make_inputs(spec, tokens=20, active=2)))
    tiles = math.ceil(20 * 2 / 32) + 4
    assert dict(launches.launched) == {
        "route": (1, 1, 1),
        "grouped_gate_up": (tiles * 768 // 64, 1, 1),
        "grouped_down": (tiles * 2048 // 128, 1, 1),
        "reduce_terms": (20, 2, 1),
    }

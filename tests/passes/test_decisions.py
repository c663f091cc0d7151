"""The passes that decide and do not rewrite: quantize, schedule, prefetch."""

import pytest

from moecc.passes.detect_moe import detect_moe
from moecc.passes.insert_prefetch import insert_prefetch
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.quantize_experts import quantize_experts
from moecc.passes.schedule_offload import schedule_offload
from moecc.runtime.errors import OptionError
from tests.models import GroupedMoe, capture, tokens

BYTES = 4 * 3 * 16 * 8 * 2


@pytest.fixture(scope="module")
def program() -> Program:
    return detect_moe(Program(gm=capture(GroupedMoe(), tokens(6)).gm), Options()).program


def test_quantize_is_off_unless_asked_for(program: Program) -> None:
    outcome = quantize_experts(program, Options())
    assert (outcome.program, outcome.misses) == (program, ())


def test_quantize_gives_each_block_its_scheme_once(program: Program) -> None:
    outcome = quantize_experts(program, Options(quantize="int4"))
    assert [str(block.schemes) for block in outcome.program.blocks] == ["int4-g32"]
    assert (outcome.rewrites, outcome.misses) == (1, ())
    again = quantize_experts(outcome.program, Options(quantize="int4"))
    assert (again.program, again.rewrites) == (outcome.program, 0)


def test_quantize_says_which_blocks_no_pattern_means(program: Program) -> None:
    outcome = quantize_experts(program, Options(quantize={"model.*": "int8"}))
    assert [block.schemes for block in outcome.program.blocks] == [None]
    assert "match nothing of it" in outcome.misses[0].why
    path = program.blocks[0].path
    outcome = quantize_experts(program, Options(quantize={path: "mxfp4", "*": "int8"}))
    assert [str(block.schemes) for block in outcome.program.blocks] == ["mxfp4"]


@pytest.mark.parametrize("budget", [None, BYTES, 1.0])
def test_schedule_places_every_block(program: Program, budget: int | float | None) -> None:
    outcome = schedule_offload(program, Options(expert_memory=budget))
    assert [placement.bytes for placement in outcome.program.placements] == [BYTES]
    assert (outcome.misses, outcome.rewrites) == ((), 0)


@pytest.mark.parametrize("budget", [BYTES - 1, 0.5])
def test_schedule_refuses_a_budget_that_memory_exceeds(
    program: Program, budget: int | float
) -> None:
    with pytest.raises(OptionError, match=rf"take {BYTES:,}.*moecc.load\(.*moecc.offload\("):
        schedule_offload(program, Options(expert_memory=budget))


def test_prefetch_has_nothing_to_fetch_for_resident_experts(program: Program) -> None:
    outcome = insert_prefetch(program, Options())
    assert (outcome.program, outcome.rewrites) == (program, 0)
    assert "resident" in outcome.note

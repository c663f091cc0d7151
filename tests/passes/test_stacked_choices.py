"""Masks of all choices in one tensor, written row by row, and dispatch tensors with gradients."""

import pytest
import torch

from tests.passes import stacked_gates as gates
from tests.passes.rewriting import rewritten
from tests.passes.test_exclusive_counts import LENGTHS, error, to_one_expert


@pytest.mark.parametrize(
    "model",
    [gates.StackedRows, gates.ThreeRows, gates.StraightThrough, gates.InPlaceRows, gates.OtherRow],
)
@pytest.mark.parametrize("crowded", [False, True])
def test_computes_what_the_model_does_for_any_length(
    model: type[gates.StackedRows], crowded: bool
) -> None:
    one = model()
    if crowded:
        to_one_expert(one)
    compiled = rewritten(one)
    assert max(error(compiled, length) for length in LENGTHS) < 1e-5
    assert compiled.blocks == [1, 1], compiled.results[0].misses
    (block,) = compiled.results[1].program.blocks
    assert (block.style, block.active) == ("capacity", model.choices)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (gates.AllFromZero, "do not start where"),
        (gates.BehindTheLast, "do not start where"),
        (gates.OneTooEarly, "do not start where"),
        (gates.BehindSome, "do not start where"),
        (gates.DrawnLate, "do not start where"),
        (gates.RowFilled, "not counted"),
        (gates.AllWritten, "written to in place"),
        (gates.PartWritten, "written to in place"),
        (gates.OneMemory, "written to in place"),
        (gates.OtherOrder, "not counted"),
        (gates.CountOfChoices, "counts over choices"),
        (gates.LargeWeights, "may be above one"),
        (gates.SharesOfOthers, "may be above one"),
        (gates.TakesAnother, "does not give each token one position"),
        (gates.RoundedThrough, "rounded to less"),
    ],
)
def test_look_alikes_are_left_alone_with_a_reason(
    model: type[gates.StackedRows], reason: str
) -> None:
    compiled = rewritten(model())
    assert error(compiled, 8) == 0
    (result,) = compiled.results
    assert result.program.blocks == ()
    assert any(reason in miss.why and miss.fallback for miss in result.misses), result.misses


def test_lengths_that_equal_other_sizes_need_no_graph_of_their_own() -> None:
    compiled = rewritten(gates.StraightThrough())
    assert max(error(compiled, length) for length in (9, 2, 4, 8, 30)) < 1e-5
    assert compiled.blocks == [1, 1]


def test_a_straight_through_one_is_one_up_to_two_roundings() -> None:
    weights = torch.rand(100_000).clamp(min=1e-12)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own = weights.to(dtype)
        off = (1 + own - own).double() - 1
        assert off.abs().max() <= torch.finfo(dtype).eps
        assert ((0 + own - own) == 0).all()

"""Counts of the tokens before one, written with pads: what is one is raised, what is not stays."""

import pytest
import torch
from torch import nn

from tests.models import EXPERTS, HIDDEN, relative_error
from tests.passes import scattered_gates as gates
from tests.passes.rewriting import Rewritten, rewritten

LENGTHS = (8, 13, 40)


def error(compiled: Rewritten, length: int, batch: int = 2) -> float:
    """Compare both with the same draws."""
    x = torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(length))
    results: list[torch.Tensor] = []
    for call in (compiled.call, compiled.model):
        torch.manual_seed(length)
        with torch.no_grad():
            results.append(call(x))
    return relative_error(results[0], results[1])


def to_one_expert(model: nn.Module) -> None:
    """Make most tokens prefer expert 2, then 1."""
    preference = torch.tensor([-2.0, 1.0, 2.0, -1.0])
    router = model.get_submodule("router")
    assert isinstance(router, nn.Linear)
    router.weight.data = preference[:, None].expand(EXPERTS, HIDDEN).contiguous()


@pytest.mark.parametrize(
    "model", [gates.PaddedCounts, gates.CutBehind, gates.AllSecond, gates.NoSecond]
)
@pytest.mark.parametrize("crowded", [False, True])
def test_computes_what_the_model_does_for_any_length(
    model: type[gates.PaddedCounts], crowded: bool
) -> None:
    one = model()
    if crowded:
        to_one_expert(one)
    compiled = rewritten(one)
    assert max(error(compiled, length) for length in LENGTHS) < 1e-5
    assert compiled.blocks == [1, 1], compiled.results[0].misses
    (block,) = compiled.results[1].program.blocks
    assert (block.style, block.active) == ("capacity", model.choices)


def test_the_draw_is_made_once_and_in_the_same_place() -> None:
    compiled = rewritten(gates.PaddedCounts())
    assert error(compiled, 8) < 1e-5
    after = torch.rand(())
    with torch.no_grad():
        torch.manual_seed(8)
        compiled.call(torch.randn(2, 8, HIDDEN, generator=torch.Generator().manual_seed(8)))
    assert torch.equal(torch.rand(()), after)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (gates.PadBehind, "not a count"),
        (gates.PadByTwo, "not a mask of zeros and ones"),
        (gates.PadOfExperts, "not a mask of zeros and ones"),
        (gates.CountOfExperts, "does not count all tokens"),
        (gates.CountOfGroups, "does not count all tokens"),
        (gates.PadOfHalves, "not a count"),
        (gates.TwoLeftOut, "not a count"),
        (gates.CountWrittenTo, "written to in place"),
        (gates.PadWrittenTo, "written to in place"),
        (gates.MaskWrittenAfter, "written to in place"),
        (gates.FirstFromOne, "do not start where"),
        (gates.SecondFromZero, "do not start where"),
        (gates.SecondBehindItself, "do not start where"),
        (gates.DrawnNumbers, "not the position of a token with one expert"),
        (gates.SwitchedOffTooLate, "more than the experts"),
    ],
)
def test_look_alikes_are_left_alone_with_a_reason(
    model: type[gates.PaddedCounts], reason: str
) -> None:
    compiled = rewritten(model())
    assert error(compiled, 8) == 0
    (result,) = compiled.results
    assert result.program.blocks == ()
    assert any(reason in miss.why and miss.fallback for miss in result.misses), result.misses

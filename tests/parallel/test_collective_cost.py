"""Where gathering stops being sooner."""

import math

import pytest

from moecc.codegen.collective_cost import SECONDS, few_tokens
from moecc.runtime.parallel.exchange import Shape
from moecc.runtime.parallel.wire import Wire

WIRE = Wire(gather=1e-4, swap=2e-4, bandwidth=1e9)


@pytest.mark.parametrize("tokens", ["replicated", "split"])
@pytest.mark.parametrize("ranks", [4, 8, 64])
def test_both_ways_take_as_long_where_they_cross(tokens: str, ranks: int) -> None:
    shape = Shape(tokens=tokens, ranks=ranks, active=2, out=4112, back=4096)
    few = few_tokens(WIRE, shape)
    assert 0 < few < 1000
    known = {"T": few, "N": ranks, "K": 2, "b_out": 4112, "b_back": 4096, "B": WIRE.bandwidth}
    known |= {"t_gather": WIRE.gather, "t_swap": WIRE.swap}
    first, second = (
        float(one.subs({symbol: known[symbol.name] for symbol in one.free_symbols}))
        for (kind, _), one in SECONDS.items()
        if kind == tokens
    )
    assert first == pytest.approx(second)


def test_two_ranks_send_the_same_either_way_so_that_one_message_is_always_sooner() -> None:
    shape = Shape(tokens="replicated", ranks=2, active=2, out=4112, back=4096)
    assert few_tokens(WIRE, shape) == math.inf


def test_a_slow_all_gather_is_never_sooner() -> None:
    slow = Wire(gather=1e-3, swap=1e-4, bandwidth=1e9)
    assert few_tokens(slow, Shape(tokens="split", ranks=4, active=2, out=4112, back=4096)) == 0

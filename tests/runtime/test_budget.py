"""Shares of bits: never over budget, near the best there is, and the same every time."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.runtime.errors import InputError
from moecc.runtime.schemes.budget import allocate, relative_error
from moecc.runtime.schemes.scheme import SCHEMES

tables = st.integers(1, 4).flatmap(
    lambda matrices: st.lists(
        st.lists(st.tuples(st.integers(1, 40), st.integers(0, 99)), min_size=3, max_size=3),
        min_size=matrices,
        max_size=matrices,
    )
)


@settings(deadline=None)
@given(table=tables, room=st.integers(0, 100))
def test_fits_the_budget_and_is_near_the_best_of_all_choices(table, room: int) -> None:
    sizes = [[size for size, _ in one] for one in table]
    errors = [[float(error) for _, error in one] for one in table]
    budget = sum(map(min, sizes)) + room
    chosen = allocate(errors, sizes, budget)
    assert sum(size[c] for size, c in zip(sizes, chosen, strict=True)) <= budget
    fitting = [
        sum(error[c] for error, c in zip(errors, every, strict=True))
        for every in product(range(3), repeat=len(table))
        if sum(size[c] for size, c in zip(sizes, every, strict=True)) <= budget
    ]
    got = sum(error[c] for error, c in zip(errors, chosen, strict=True))
    largest_step = max(max(error) - min(error) for error in errors)
    assert min(fitting) <= got <= min(fitting) + largest_step


def test_bytes_go_where_they_save_most() -> None:
    errors, sizes = [[8.0, 1.0], [3.0, 1.0], [9.0, 1.0]], [[10, 20]] * 3
    assert allocate(errors, sizes, 30) == [0, 0, 0]
    assert allocate(errors, sizes, 49) == [0, 0, 1]
    assert allocate(errors, sizes, 50) == [1, 0, 1]
    assert allocate(errors, sizes, 60) == [1, 1, 1]


def test_what_is_larger_and_no_better_is_never_chosen() -> None:
    assert allocate([[5.0, 6.0, 1.0]], [[10, 15, 20]], 19) == [0]
    assert allocate([[5.0, 5.0, 1.0]], [[10, 10, 20]], 19) == [0]


def test_a_budget_below_the_smallest_schemes_is_refused() -> None:
    with pytest.raises(InputError, match="smallest schemes take 20 bytes, more than the 19 allow"):
        allocate([[1.0], [1.0]], [[10], [10]], 19)


def test_the_error_of_matrices_is_that_of_their_codes() -> None:
    weights = [torch.randn(32, 96), torch.zeros(16, 96)]
    found = {name: relative_error(weights, SCHEMES[name]) for name in ("int8", "int4", "int2")}
    assert 0 < found["int8"] < 1e-3 < found["int4"] < 1e-2 < found["int2"] < 0.5
    assert relative_error([torch.zeros(16, 64)], SCHEMES["int4"]) == 0

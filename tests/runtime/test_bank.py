"""A bank holds the experts' parameters once, and notices when they move."""

from typing import Any

import pytest
import torch
from torch import nn

from moecc.runtime.bank import Bank, refresh, together
from moecc.runtime.errors import InputError


class Holder(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.pool = nn.ModuleList(nn.Linear(4, 2) for _ in range(count))


def banked(holder: Holder) -> Bank:
    experts = [*holder.pool]
    parts: Any = {
        "weight": [[(one, "weight")] for one in experts],
        "bias": [[(one, "bias")] for one in experts],
    }
    return Bank(holder, experts, parts)


def test_parameters_become_views_of_their_place() -> None:
    holder = Holder()
    before = [one.weight.clone() for one in holder.pool]
    weights = banked(holder).tensors["weight"]
    assert weights.shape == (3, 2, 4)
    for number, one in enumerate(holder.pool):
        assert torch.equal(one.weight, before[number])
        assert one.weight.data_ptr() == weights[number].data_ptr()


def test_several_parameters_of_an_expert_lie_one_after_another() -> None:
    holder = Holder(4)
    a, b, c, d = holder.pool
    pairs = [[(a, "weight"), (b, "weight")], [(c, "weight"), (d, "weight")]]
    joined = Bank(holder, [a, b, c, d], {"both": pairs}).tensors["both"]
    assert joined.shape == (2, 4, 4)
    assert torch.equal(joined[1], torch.cat([c.weight, d.weight]))


def test_writes_to_parameters_are_seen_at_once() -> None:
    holder = Holder()
    bank = banked(holder)
    with torch.no_grad():
        holder.pool[1].weight.fill_(7)
    assert (bank.tensors["weight"][1] == 7).all()
    assert bank.refresh() == 0


def test_a_parameter_that_moved_is_copied_back() -> None:
    holder = Holder()
    weights = banked(holder).tensors["weight"]
    holder.pool[2].weight.data = torch.full((2, 4), 5.0)
    refresh(weights)
    assert (weights[2] == 5).all()
    assert holder.pool[2].weight.data_ptr() == weights[2].data_ptr()


def test_a_parameter_of_another_shape_or_dtype_is_an_error() -> None:
    for other in (torch.zeros(3, 4), torch.zeros(2, 4, dtype=torch.float64)):
        holder = Holder()
        bank = banked(holder)
        holder.pool[0].weight = nn.Parameter(other)
        with pytest.raises(InputError, match=r"changed its shape, dtype or device .* call torch"):
            bank.refresh()


def test_an_exchanged_module_is_an_error() -> None:
    holder = Holder()
    bank = banked(holder)
    holder.pool[1] = nn.Linear(4, 2)
    with pytest.raises(InputError, match=r"was replaced after torch\.compile"):
        bank.refresh()


def test_shared_parameters_are_refused_and_nothing_moves() -> None:
    holder = Holder()
    holder.pool[1].weight = holder.pool[0].weight
    places = [one.weight.data_ptr() for one in holder.pool]
    with pytest.raises(InputError, match="shared between experts"):
        banked(holder)
    assert [one.weight.data_ptr() for one in holder.pool] == places


def test_parameters_without_data_are_refused() -> None:
    holder = Holder().to("meta")
    with pytest.raises(InputError, match="without data"):
        banked(holder)


def test_a_tensor_of_no_bank_needs_no_refresh() -> None:
    refresh(torch.zeros(2))


def test_parameters_lie_together_from_the_first_call_on() -> None:
    parameters = [one.weight for one in Holder().pool]
    before = [one.clone() for one in parameters]
    seen = together(parameters)
    assert torch.equal(seen, torch.stack(before))
    assert seen.data_ptr() == together(parameters).data_ptr() == parameters[0].data_ptr()
    with torch.no_grad():
        parameters[2].fill_(7)
    assert (seen[2] == 7).all()


def test_parameters_that_left_are_brought_together_again() -> None:
    parameters = [one.weight for one in Holder().pool]
    together(parameters)
    parameters[1].data = torch.full((2, 4), 5.0)
    assert (together(parameters)[1] == 5).all()
    assert parameters[1].data_ptr() == together(parameters)[1].data_ptr()


def test_parameters_of_two_groups_keep_their_values() -> None:
    a, b, c = (one.weight for one in Holder().pool)
    before = [one.clone() for one in (a, b, c)]
    for _ in range(2):
        assert torch.equal(together([a, b]), torch.stack(before[:2]))
        assert torch.equal(together([c, a]), torch.stack([before[2], before[0]]))


def test_parameters_may_be_brought_together_in_inference_mode() -> None:
    holder = Holder()
    parameters = [one.weight for one in holder.pool]
    with torch.inference_mode():
        together(parameters)
    holder.pool[0](torch.randn(1, 4)).sum().backward()
    assert parameters[0].grad is not None

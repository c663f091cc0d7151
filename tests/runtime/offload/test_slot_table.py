"""The table of slots: right for what a call names, and made anew only when that changed."""

import random

import torch

from moecc.runtime.offload.slot_table import SlotTable

CPU = torch.device("cpu")


def test_it_is_right_for_what_is_wanted() -> None:
    chance, table = random.Random(1), SlotTable(6)
    for _ in range(200):
        wanted = sorted(chance.sample(range(6), chance.randint(0, 6)))
        slots = {expert: chance.randrange(9) for expert in wanted if chance.random() < 0.7}
        shown = table.show(slots, wanted, CPU)
        assert shown[wanted].tolist() == [slots.get(expert, -1) for expert in wanted]


def test_it_is_copied_only_when_it_changed() -> None:
    table = SlotTable(6)
    first = table.show({1: 0, 4: 2}, [1, 4], CPU)
    assert table.show({1: 0, 4: 2}, [1, 4], CPU) is first
    assert table.show({4: 2}, [4], CPU) is first, "the other one is not asked for"
    assert table.show({4: 2}, [1, 4], CPU) is not first, "it is, and not there"

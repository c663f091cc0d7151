"""What tokens chose when they came last is a guess of what they choose next."""

import pytest
import torch

from moecc.runtime.offload import token_memory
from moecc.runtime.offload.token_memory import TokenMemory


def choose(memory: TokenMemory, *passed: tuple[int, list[int]]) -> None:
    memory.recall([token for token, _ in passed])
    memory.learn(torch.tensor([chosen for _, chosen in passed]))


def test_a_token_recalls_its_last_choice_best_first() -> None:
    memory = TokenMemory()
    assert memory.recall([7]) == []
    choose(memory, (7, [3, 1]), (8, [0, 5]), (7, [4, 2]))
    assert memory.recall([7]) == [4, 2]


def test_several_tokens_take_turns_and_name_each_expert_once() -> None:
    memory = TokenMemory()
    choose(memory, (7, [3, 1]), (8, [0, 3]))
    assert memory.recall([8, 9, 7]) == [0, 3, 1]


def test_a_choice_of_other_tokens_than_were_announced_is_not_learned() -> None:
    memory = TokenMemory()
    memory.recall([7])
    memory.learn(torch.tensor([[3, 1], [0, 2]]))  # a prefill without tokens
    memory.learn(torch.tensor([[5, 6]]))  # nor does an earlier announcement hold
    assert memory.recall([7]) == []


def test_what_was_not_chosen_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_memory, "MOST", 2)
    memory = TokenMemory()
    choose(memory, (1, [1]), (2, [2]), (1, [3]), (4, [4]))
    assert [memory.recall([token]) for token in (1, 2, 4)] == [[3], [], [4]]

"""Copies of tensors are made once, and again after a write."""

import gc
import threading
import time
from collections.abc import Sequence

import torch

from moecc.runtime.schemes.copies import Copies

made: list[float] = []


def doubled(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    (tensor, _) = tensors
    assert tensor is not None
    made.append(float(tensor[0]))
    time.sleep(0.01)
    return tensor * 2


def test_a_copy_is_made_once_for_all_names_of_a_tensor() -> None:
    made.clear()
    copies, tensor = Copies(doubled), torch.tensor([1.0, 2.0])
    first = copies.of((tensor, None))
    assert first.tolist() == [2, 4]
    assert copies.of((tensor.detach(), None)) is first
    assert copies.of((tensor.view(1, 2)[0], None)) is first
    assert made == [1]


def test_a_write_is_noticed_through_any_name() -> None:
    made.clear()
    copies, tensor = Copies(doubled), torch.tensor([1.0, 2.0])
    copies.of((tensor, None))
    tensor.view(2, 1)[0] = 5
    assert copies.of((tensor, None)).tolist() == [10, 4]
    assert made == [1, 5]


def test_other_memory_at_the_same_place_is_another_tensor() -> None:
    made.clear()
    copies = Copies(doubled)
    for value in range(20):  # freed memory is soon given out again
        tensor = torch.full((4096,), float(value))
        assert copies.of((tensor, None))[7] == 2 * value
        del tensor
        gc.collect()
    assert made == list(range(20))
    assert len(copies._copies) == 1


def test_inference_tensors_have_no_version_and_one_copy() -> None:
    made.clear()
    with torch.inference_mode():
        tensor = torch.ones(2)
        copies = Copies(doubled)
        assert copies.of((tensor, None)) is copies.of((tensor, None))


def test_threads_that_ask_at_once_share_one() -> None:
    made.clear()
    copies, tensor = Copies(doubled), torch.ones(8)
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(copies.of((tensor, None)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert all(one is found[0] for one in found)

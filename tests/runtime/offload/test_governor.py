"""What guesses are worth: p * gain > (1 - p) * (gain * busy + regret * read)."""

from pathlib import Path

import torch

from moecc.runtime.offload.governor import Governor
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.policy import POLICIES
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.trial import TRY
from tests.runtime.offload.test_bank import EXPERTS, Block


def told(*came_true: bool, times: int = 200, window: float = 1.0) -> Governor:
    governor = Governor()
    for _ in range(times):
        governor.observe(came_true, window)
    return governor


def test_ranks_that_come_true_are_read_and_others_are_not() -> None:
    assert told(True, False).worth(2, read=1.0, busy=0.9) == [True, False]


def test_an_idle_link_takes_chances_that_a_busy_one_does_not() -> None:
    governor = Governor(precision=[0.3], window=1.0)
    assert governor.worth(1, read=1.0, busy=0.2) == [True]
    assert governor.worth(1, read=1.0, busy=0.8) == [False]


def test_a_window_shorter_than_a_read_gains_less() -> None:
    sure = Governor(precision=[0.6], window=0.1, regret=0.2)
    assert sure.worth(1, read=1.0, busy=0.5) == [False]
    sure.window = 1.0
    assert sure.worth(1, read=1.0, busy=0.5) == [True]


def test_what_was_there_tells_nothing_of_guesses_that_are_read() -> None:
    governor = Governor()
    for _ in range(200):
        governor.observe([None, True, False], 1.0)
    assert governor.worth(3, read=1.0, busy=1.0) == [False, True, False]


def test_experts_that_are_missed_after_a_guess_drove_them_out_stop_guesses() -> None:
    governor = Governor(precision=[0.4], window=1.0)
    for _ in range(200):
        governor.driven_out(True)
    assert governor.worth(1, read=1.0, busy=0.0) == [False]
    for _ in range(200):
        governor.driven_out(False)
    assert governor.worth(1, read=1.0, busy=0.0) == [True]


def test_a_rank_that_failed_comes_back_when_it_comes_true_again() -> None:
    governor = told(False)
    assert governor.worth(1, read=1.0, busy=1.0) == [False]
    for _ in range(200):
        governor.observe([True], 1.0)
    assert governor.worth(1, read=1.0, busy=1.0) == [True]


def test_a_bank_reads_what_is_foretold_and_checks_it(tmp_path: Path) -> None:
    block, link = Block(tmp_path, "native", torch.float32), Link()
    bank = block.bank(Pool(block.store.layout, EXPERTS - 1, POLICIES["lru"], link))
    hidden, ids, weights = block.batch(1)
    for turn in range(TRY):
        ids = torch.tensor([[turn % EXPERTS, (turn + 1) % EXPERTS]])
        scores = torch.zeros(1, EXPERTS).scatter_(1, ids, torch.tensor([[2.0, 1.0]]))
        bank.foretell(scores, 2, 1)
        block.check(bank, [hidden, ids, weights])
    counts, guesses = bank.pool.trace.counts, bank.guesses
    assert (guesses.made, guesses.right, guesses.whole) == (TRY, 2 * TRY, TRY)
    assert counts.useful > TRY * 2 / 3
    assert counts.misses < TRY / 3
    link.close()


def test_a_prefill_is_not_guessed(tmp_path: Path) -> None:
    block, link = Block(tmp_path, "native", torch.float32), Link()
    bank = block.bank(Pool(block.store.layout, 3, POLICIES["lru"], link))
    bank.foretell(torch.rand(100, EXPERTS), 2, 1)
    assert bank.pool.trace.counts.predicted == 0
    link.close()

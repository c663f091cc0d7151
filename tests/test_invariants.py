"""What the expert cache promises, the tests that hold it, and those that need a whole model.

1. offload never changes the output
       test_bank::test_every_number_of_slots_gives_the_bits_of_all
       test_load::test_a_family_gives_the_same_bits_at_every_budget
       test_device_link::test_late_copies_change_no_bit
2. memory never exceeds the budget, and one that is too small is refused
       test_plan::test_no_share_exceeds_its_budget
       test_load::test_a_budget_that_is_one_byte_short_is_refused
       test_pool::test_shrinking_gives_memory_back
3. a block's top-k is one request: what is there computes meanwhile, each is loaded at most once
       test_bank::test_what_is_there_computes_while_the_rest_arrives
       test_bank::test_every_number_of_slots_gives_the_bits_of_all
       test_cache::test_a_refused_request_changes_nothing
4. a read that fails is retried if that can help, then raised; the next call works
       test_faults::test_an_error_that_goes_away_is_retried
       test_faults::test_an_error_that_stays_names_file_expert_and_byte
       test_bank::test_a_call_that_fails_leaves_the_next_one_right
5. the replay of a trace gives the engine's hits and misses
       test_replay::test_a_runs_own_trace_gives_its_own_counts
       test_cli_offload::test_a_runs_own_trace_gives_what_its_engine_counted
6. two threads may call one model
       test_invariants::test_two_threads_may_call_one_compiled_model
       test_bank::test_two_threads_may_call_one_bank
7. weights exist once
       test_invariants::test_kernels_read_the_models_own_experts
       test_load::test_loading_reads_no_expert
       test_pack::test_memory_holds_a_few_experts_not_all

And the faults, after each of which no slot, file or thread is lost, and the next call is right:

short reads                test_faults::test_short_reads_go_on_where_they_stopped
an error once, for ever    test_faults::test_an_error_that_goes_away_is_retried
                           test_pool::test_what_failed_is_read_anew
a file cut off, replaced   test_faults::test_a_truncated_file_is_said_to_be
                           test_faults::test_a_file_that_is_replaced_stays_the_one_that_was_opened
                           test_faults::test_a_file_that_is_written_to_is_an_error
a wrong checksum           test_faults::test_a_checksum_that_stays_wrong_names_file_expert_and_byte
a full disk                test_pack::test_a_full_disk_says_so_and_keeps_what_is_packed
a dead reader              test_faults::test_a_reader_that_dies_is_replaced
reads of seconds           test_invariants::test_reads_of_seconds_are_waited_for_and_counted
^C                         test_invariants::test_an_interrupt_in_generate_loses_nothing
                           test_pool::test_an_interrupt_while_waiting_loses_nothing
a fork                     test_bank::test_a_forked_child_computes_too
                           test_pool::test_a_fork_waits_for_calls_that_run
a smaller budget           test_bank::test_blocks_share_a_pool
                           test_pool::test_shrinking_stops_what_is_on_its_way
10,500 random requests     test_cache::test_it_does_what_a_naive_model_does
"""

import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moecc
from moecc.lenders import banks_of
from moecc.runtime.offload import native_readers
from moecc.runtime.offload.store import Files
from moecc.runtime.watch import watching
from moecc.tiny import tiny_model
from tests.passes.test_gathered import GptFast
from tests.runtime.offload.stores import Gate, in_a_thread, open_files, readers
from tests.test_offload import make, tokens

IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 3, 64, 12]])
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qwen3_moe")
    tiny_model("qwen3_moe").save_pretrained(made)
    return made


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    """A model with slots for a quarter of its experts, which leaves nothing pinned or open."""
    before = open_files(), len(readers())
    made = moecc.load(folder, expert_memory="25%")
    yield made
    banks = banks_of(made)
    assert not any(bank.pool.cache._pins for bank in banks)
    banks[0].pool.link.close()
    assert (open_files(), len(readers())) == before


def test_the_tests_that_are_named_exist() -> None:
    named: list[tuple[str, str]] = re.findall(r"(test_\w+)::(test_\w+)", __doc__ or "")
    files: dict[str, str] = defaultdict(str)
    for file in Path(__file__).parent.rglob("test_*.py"):
        files[file.stem] += file.read_text()
    assert len(named) > 30
    assert not [name for file, name in named if f"def {name}(" not in files[file]]


def test_two_threads_may_call_one_compiled_model(tmp_path: Path) -> None:
    model = moecc.offload(make(GptFast), tokens(3), store=tmp_path, expert_memory="50%")
    compiled = torch.compile(model, backend="moecc", dynamic=True, options={"inner": "eager"})
    inputs = [tokens(count) for count in (3, 1, 2, 9)]
    expected = [compiled(one) for one in inputs]

    def call() -> None:
        with torch.no_grad():  # which a thread does not inherit
            for _ in range(5):
                for one, out in zip(inputs, expected, strict=True):
                    assert torch.equal(compiled(one), out)

    for result in [in_a_thread(call), in_a_thread(call)]:
        result()
    counts = [bank.pool.trace.counts for bank in banks_of(model)]
    assert all(one.requests == 4 + 2 * 5 * 4 and one.misses for one in counts)


def test_kernels_read_the_models_own_experts() -> None:
    model = make(GptFast)
    with watching() as seen:
        torch.compile(model, backend="moecc", options={"inner": "eager"})(tokens(3))
    read = {matrix.data_ptr() for one in seen for matrix in one.tensors.values()}
    assert len(read) == 2 * 3
    assert read <= {one.data_ptr() for one in model.parameters()}


def slow_reads(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[], float]) -> None:
    original = Files.read

    def read(files: Files, *args: Any) -> None:
        time.sleep(seconds())
        original(files, *args)

    monkeypatch.setattr(Files, "read", read)
    monkeypatch.setattr(native_readers, "BY_HAND", True)


def test_reads_of_seconds_are_waited_for_and_counted(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = moecc.load(folder)(IDS).logits
    left = [1.2]  # above what a wait looks for dead readers after
    slow_reads(monkeypatch, lambda: left.pop() if left else 0.0)
    assert torch.equal(model(IDS).logits, expected)
    assert sum(bank.pool.trace.counts.wait_seconds for bank in banks_of(model)) > 1.1


def test_an_interrupt_in_generate_loses_nothing(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = moecc.load(folder).generate(IDS, **GREEDY)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            gate = Gate(patch)
            pressing = in_a_thread(lambda: (gate.arrived(1), os.kill(os.getpid(), signal.SIGINT)))
            with pytest.raises(KeyboardInterrupt):
                model.generate(IDS, **GREEDY)
            pressing()
            gate.open()
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.equal(model.generate(IDS, **GREEDY), expected)

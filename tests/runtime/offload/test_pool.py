"""Slots that are filled from disk: whatever goes wrong, no slot, pin or thread is lost."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moecc.runtime.errors import InputError, StoreError
from moecc.runtime.offload import load as load_module
from moecc.runtime.offload.link import Link, NewReaders
from moecc.runtime.offload.load import Load
from moecc.runtime.offload.policy import Key, lru
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.store import Store
from tests.runtime.offload.stores import (
    KINDS,
    SIZE,
    Gate,
    fail_reads,
    in_a_thread,
    in_child,
    open_files,
    readers,
    write_store,
)

EIO = OSError(errno.EIO, "Input/output error")


class Watched:
    """A pool of two slots over four experts, and what should be in them."""

    def __init__(self, folder: Path, kind: NewReaders) -> None:
        self.store, self.data = write_store(folder)
        self.link = Link(1, new=kind)
        self.pool = Pool(self.store.layout, 2, lru, self.link)

    def use(self, *experts: int) -> None:
        """Request experts as a block does, and look at every byte."""
        keys: list[Key] = [(0, expert) for expert in experts]
        with self.pool.lock:
            admitted = self.pool.request(self.store, keys)
            try:
                for one in admitted:
                    self.pool.wait(one.key)
                    record = self.pool.records[one.slot]
                    assert torch.equal(record[:SIZE], self.data[one.key[1]])
            finally:
                self.pool.cache.release(keys)

    def check_nothing_is_lost(self) -> None:
        """No pins; every slot can be filled with anything."""
        self.use(0, 1)
        self.use(2, 3)
        self.use(1, 2)


@pytest.fixture
def watched(tmp_path: Path, kind: NewReaders) -> Iterator[Watched]:
    before = open_files(), len(readers())
    made = Watched(tmp_path, kind)
    yield made
    made.check_nothing_is_lost()
    made.link.close()
    assert (open_files(), len(readers())) == before


def test_experts_come_and_go(watched: Watched) -> None:
    for experts in ((0,), (1, 2), (2, 0), (3, 2), (2, 3)):
        watched.use(*experts)


def test_what_failed_is_read_anew(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_reads(monkeypatch, [EIO, EIO])
    with pytest.raises(StoreError, match=r"expert 1 of .*Input/output error"):
        watched.use(1, 0)
    watched.use(1, 0)
    watched.pool.predict(watched.store, [(0, 2)], 1, 1)
    assert watched.pool.trace.counts.predicted == 1


def test_a_prediction_that_fails_is_raised_only_where_it_is_needed(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_reads(monkeypatch, [EIO, EIO])
    pool = watched.pool
    pool.predict(watched.store, [(0, 2)], 1, 1)
    assert pool.trace.counts.predicted == 1
    with pytest.raises(StoreError, match="expert 2"):
        pool.wait((0, 2))
    assert pool.is_late((0, 2))  # and is not computed with
    watched.use(2)
    assert pool.trace.counts.useful == 1


def test_a_prediction_is_counted_useful_when_it_is_asked_for(watched: Watched) -> None:
    pool, counts = watched.pool, watched.pool.trace.counts
    pool.predict(watched.store, [(0, 3), (0, 2), (0, 1)], 1, 2)
    assert pool.trace.counts.predicted == 2
    watched.use(3)
    watched.use(0, 1)  # 2 leaves unused
    watched.use(2)
    assert (counts.predicted, counts.useful) == (2, 1)


def test_an_expert_that_leaves_while_it_comes_is_stopped(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "CHUNK", 2048)  # three to an expert
    gate = Gate(monkeypatch)
    load = foretell(watched, 0)
    gate.arrived(1)
    using = in_a_thread(lambda: watched.use(2, 3))
    while not load.cancelled:
        pass
    gate.open()
    using()
    assert len(gate.order) == 7  # one chunk of it, three of each of the others


def foretell(watched: Watched, expert: int) -> Load:
    """Predict one expert and give its load."""
    watched.pool.predict(watched.store, [(0, expert)], 1, 1)
    return watched.pool._loads[watched.pool.cache.slot((0, expert))]


@pytest.fixture
def keyboard() -> Iterator[None]:
    """Let ^C raise, also where a shell that runs the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_when(happened: Any) -> threading.Thread:
    """Press ^C in the main thread once something has happened."""

    def press() -> None:
        happened()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


@pytest.mark.usefixtures("keyboard")
def test_an_interrupt_while_waiting_loses_nothing(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    pressing = interrupt_when(lambda: gate.arrived(1))
    with pytest.raises(KeyboardInterrupt):
        watched.use(0, 1)
    pressing.join()
    gate.open()


@pytest.mark.usefixtures("keyboard")
def test_an_interrupt_while_another_load_stops_loses_nothing(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    load = foretell(watched, 0)
    gate.arrived(1)

    def stopping() -> None:
        while not load.cancelled:
            pass

    pressing = interrupt_when(stopping)
    with pytest.raises(KeyboardInterrupt):
        watched.use(2, 3)  # has to wait until 0 is no longer written
    pressing.join()
    assert (0, 3) not in watched.pool.cache  # its slot holds nothing good
    gate.open()
    watched.use(2, 3)


def test_no_threads_left_loses_nothing(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            watched.use(0, 1)
    assert len(watched.pool.cache) == 0


def test_two_threads_may_fork_at_once(watched: Watched) -> None:
    with watched.pool.lock:
        forking = [in_a_thread(lambda: in_child(lambda: True)) for _ in range(2)]
        time.sleep(0.05)  # both wait for this call to end
    assert [one() for one in forking] == [0, 0]
    in_a_thread(lambda: watched.use(0, 1))()


def test_closing_during_loads_is_an_error_and_never_garbage(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    using = in_a_thread(lambda: watched.use(0, 1))
    gate.arrived(1)
    closing = in_a_thread(watched.link.close)
    while not watched.link._readers.closed:
        pass
    assert watched.pool.is_late((0, 1))  # cancelled before it began: done, but not there
    gate.open()
    closing()
    with pytest.raises(StoreError, match="closed meanwhile"):
        using()


def test_shrinking_stops_what_is_on_its_way(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    pool = watched.pool
    pool.predict(watched.store, [(0, 0), (0, 1)], 1, 2)
    gate.arrived(1)
    pool.shrink(1)
    gate.open()
    assert not pool.records[1].any()
    watched.use(1)
    watched.use(0)
    assert not pool.records[1].any()
    for slots in (0, 2):
        with pytest.raises(InputError, match=f"1 slots cannot shrink to {slots}"):
            pool.shrink(slots)
    watched.check_nothing_is_lost = lambda: watched.use(3)


def test_shrinking_gives_memory_back(tmp_path: Path) -> None:
    store, data = write_store(tmp_path, experts=16, size=1 << 20)
    link = Link(new=KINDS["native"])
    pool = Pool(store.layout, 16, lru, link)
    keys = [(0, expert) for expert in range(16)]
    before = resident()
    for key in keys:
        pool.request(store, [key])
        pool.wait(key)
        pool.cache.release([key])
    full = resident()
    assert full - before > 15 << 20
    pool.shrink(4)
    assert full - resident() > 11 << 20
    for key in keys[::-1]:
        (one,) = pool.request(store, [key])
        pool.wait(key)
        assert torch.equal(pool.records[one.slot][: 1 << 20], data[key[1]])
        pool.cache.release([key])
    assert resident() - before < 10 << 20  # four slots, a chunk for each of four readers
    with pytest.raises(InputError, match="17 slots are more than the 16"):
        pool.grow(17)
    pool.grow(16)
    for key in keys:
        (one,) = pool.request(store, [key])
        pool.wait(key)
        pool.cache.release([key])
    assert all(key in pool.cache for key in keys)
    assert {pool.cache.slot(key) for key in keys} == set(range(16))
    assert resident() - before > 15 << 20
    link.close()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_parent_and_child_go_on_with_the_same_slots(watched: Watched) -> None:
    watched.use(0, 1)

    def in_both() -> bool:
        watched.use(1, 2)
        watched.use(3, 0)
        return True

    assert in_child(in_both) == 0
    assert in_both()


def test_a_fork_waits_for_calls_that_run(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    using = in_a_thread(lambda: watched.use(0, 1))
    gate.arrived(1)
    forking = in_a_thread(lambda: in_child(lambda: watched.use(2, 3) is None))
    gate.open()
    using()
    assert forking() == 0


def test_two_pools_share_a_link(watched: Watched, tmp_path: Path) -> None:
    other: Store = watched.store
    second = Pool(other.layout, 4, lru, watched.link)
    keys = [(1, expert) for expert in range(4)]
    admitted = second.request(other, keys)
    watched.use(3, 0)
    for one in admitted:
        second.wait(one.key)
        assert torch.equal(second.records[one.slot][:SIZE], watched.data[one.key[1]])

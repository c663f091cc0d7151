"""Reader threads: the right bytes, in the right order, whatever goes wrong."""

import errno
import gc
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.runtime.errors import InputError, StoreError
from moecc.runtime.offload import load as load_module
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.load import Load
from moecc.runtime.offload.record import PAGE, Layout, new_records
from moecc.runtime.offload.store import Files, Read, Store
from tests.runtime.offload.stores import (
    SIZE,
    Gate,
    fail_reads,
    fetch,
    in_a_thread,
    new_load,
    open_files,
    readers,
    write_store,
)

EIO = OSError(errno.EIO, "Input/output error")


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """A link with one reader and small chunks, which leaves nothing behind."""
    monkeypatch.setattr(load_module, "CHUNK", 2048)  # three to an expert
    before = open_files(), len(readers())
    made = Link(readers=1)
    yield made
    made.close()
    assert (open_files(), len(readers())) == before


@settings(max_examples=80, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 9000), st.sampled_from([0, PAGE, 2 * PAGE])),
            st.one_of(st.integers(1, 9000), st.sampled_from([PAGE, 2 * PAGE])),
            st.integers(0, 70),
        ),
        min_size=1, max_size=3,
    ),
    chunk=st.sampled_from([512, PAGE, 5000, 1 << 20]),
    direct=st.booleans(),
)  # fmt: skip
def test_any_range_of_a_file_comes_to_its_place(
    parts: list[tuple[int, int, int]], chunk: int, direct: bool
) -> None:
    data = torch.randint(256, (18_001,), dtype=torch.uint8)
    expected: list[torch.Tensor] = []
    reads: list[Read] = []
    into = 0
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        file = Path(folder) / "data.bin"
        file.write_bytes(data.numpy().tobytes())
        for offset, length, gap in parts:
            into += gap
            reads.append(Read(file=file, offset=offset, length=length, into=into))
            expected += [torch.full((gap,), 7, dtype=torch.uint8), data[offset : offset + length]]
            into += length
        store = Store(
            name="block",
            layout=Layout.of({"gate_up": ((into,), torch.uint8)}),
            reads=(tuple(reads),),
        )
        patch.setattr(load_module, "CHUNK", chunk)
        if not direct:
            patch.setattr(os, "O_DIRECT", 0)
        load = new_load(store, 0)
        load.record.fill_(7)
        link = Link()
        link.submit(load)
        link.wait(load)
        assert torch.equal(load.record[:into], torch.cat(expected))
        assert (load.record[into:] == 7).all()  # nothing beside it was written
        assert link.bytes == sum(length for _, length, _ in parts)
        link.close()


def test_memory_that_there_is_not_is_refused() -> None:
    layout = Layout.of({"gate_up": ((1 << 40,), torch.uint8)})
    for count in (1 << 20, 1 << 60):
        with pytest.raises(InputError, match=rf"cannot allocate .* for {count} experts"):
            new_records(count, layout)


def test_a_demand_overtakes_predictions(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    gate = Gate(monkeypatch)
    loads = [new_load(store, expert, priority) for expert, priority in enumerate((2, 1, 0, 3))]
    begins = [store.reads[expert][0].offset for expert in range(4)]
    link.submit(loads[0])
    gate.arrived(1)  # the reader holds a chunk of what is predicted
    for load in loads[1:]:
        link.submit(load)
    waiting = in_a_thread(lambda: link.wait(loads[3]))  # predicted last, and now needed
    while loads[3].priority:
        pass
    gate.open()
    waiting()
    for load in (loads[1], loads[0]):  # as predicted
        link.wait(load)
    owners = [max(e for e in range(4) if begins[e] <= offset) for offset, _ in gate.order]
    assert owners == [0, 2, 2, 2, 3, 3, 3, 1, 1, 1, 0, 0]
    for load, expected in zip(loads, data, strict=True):
        assert torch.equal(load.record[:SIZE], expected)


def test_cancelling_stops_within_a_chunk_and_nobody_writes_afterwards(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    gate = Gate(monkeypatch)
    load = new_load(store, 0)
    link.submit(load)
    gate.arrived(1)
    cancelled = in_a_thread(lambda: link.cancel([load]))
    while not load.cancelled:
        pass
    assert not load.done  # it has to wait for the chunk
    gate.let(1)
    cancelled()
    load.record.fill_(9)
    gate.open()
    assert torch.equal(fetch(link, store, 1), data[1])
    assert len(gate.order) == 4  # one chunk of the first, three of the other
    assert (load.record == 9).all()
    with pytest.raises(StoreError, match="meanwhile"):
        link.wait(load)


def test_an_error_that_goes_away_is_retried(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    calls = fail_reads(monkeypatch, [EIO])
    assert torch.equal(fetch(link, store, 2), data[2])
    assert calls == [4]  # three chunks, one of them twice
    assert link.bytes == SIZE


def test_an_error_that_stays_names_file_expert_and_byte(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    fail_reads(monkeypatch, [None, EIO, EIO])  # the second chunk
    byte = store.reads[2][0].offset + 2048
    message = rf"expert 2 of 'model.layers.3.experts' .*experts.bin' at byte {byte}: .*Input/output"
    with pytest.raises(StoreError, match=message):
        fetch(link, store, 2)
    assert link.bytes == 2048
    assert torch.equal(fetch(link, store, 2), data[2])


@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_go_on_where_they_stopped(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    store, data = write_store(tmp_path)
    original = os.preadv
    if not direct:
        monkeypatch.setattr(os, "O_DIRECT", 0)
    step = PAGE + 100 if direct else 100

    def short(handle: int, buffers: list[memoryview], offset: int) -> int:
        assert not direct or offset % PAGE == 0  # or the system says EINVAL
        done = original(handle, buffers, offset)
        return min(done, step)

    monkeypatch.setattr(os, "preadv", short)
    monkeypatch.setattr(load_module, "CHUNK", 1 << 20)
    for expert in range(4):
        assert torch.equal(fetch(link, store, expert), data[expert])


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("left", [0, 100, PAGE, 5013 + 2050])
def test_a_truncated_file_is_said_to_be(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, left: int
) -> None:
    if not direct:
        monkeypatch.setattr(os, "O_DIRECT", 0)
    store, data = write_store(tmp_path)
    assert torch.equal(fetch(link, store, 0), data[0])
    os.truncate(store.reads[0][0].file, left)
    calls = fail_reads(monkeypatch, [])
    message = rf"expert 1 of .*ends at byte {left}, 10026 bytes are needed: it was truncated"
    if left <= store.reads[1][0].offset:
        message = r"expert 1 of .*bytes are needed: it was truncated"
    with pytest.raises(StoreError, match=message):
        fetch(link, store, 1)
    assert calls[0] <= 4  # it does not try for ever


def test_a_file_that_is_replaced_stays_the_one_that_was_opened(link: Link, tmp_path: Path) -> None:
    store, data = write_store(tmp_path)
    assert torch.equal(fetch(link, store, 0), data[0])
    file = store.reads[0][0].file
    (tmp_path / "other").write_bytes(bytes(file.stat().st_size))
    (tmp_path / "other").replace(file)
    assert torch.equal(fetch(link, store, 1), data[1])
    link.close()  # opened again it would be another one
    with pytest.raises(StoreError, match=r"expert 2 of .*replaced since it was opened; load"):
        fetch(link, store, 2)
    file.unlink()
    with pytest.raises(StoreError, match=r"expert 2 of .*No such file"):
        fetch(link, store, 2)


def test_a_file_that_is_written_to_is_an_error(link: Link, tmp_path: Path) -> None:
    store, data = write_store(tmp_path)
    assert torch.equal(fetch(link, store, 0), data[0])
    file = store.reads[0][0].file
    with file.open("r+b") as opened:
        opened.seek(store.reads[1][0].offset)
        opened.write(bytes(SIZE))
    os.utime(file, ns=(1, 1))  # whatever the clock's resolution
    with pytest.raises(StoreError, match=r"expert 1 of .*written to or replaced"):
        fetch(link, store, 1)


def damage_reads(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Flip a bit of the first chunk, so often."""
    original, done = Files.read, [0]

    def read(self: Files, read: Read, record: torch.Tensor, start: int, length: int) -> None:
        original(self, read, record, start, length)
        if start == 0:
            done[0] += 1
            record[17] ^= done[0] <= times

    monkeypatch.setattr(Files, "read", read)
    return done


def test_a_wrong_checksum_is_read_again_once(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path, checksums=True)
    done = damage_reads(monkeypatch, times=1)
    assert torch.equal(fetch(link, store, 3), data[3])
    assert done == [2]


def test_a_checksum_that_stays_wrong_names_file_expert_and_byte(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path, checksums=True)
    damage_reads(monkeypatch, times=2)
    byte = store.reads[3][0].offset
    message = rf"expert 3 of 'model.layers.3.experts' .*experts.bin' at byte {byte} has checksum"
    with pytest.raises(StoreError, match=message):
        fetch(link, store, 3)
    assert torch.equal(fetch(link, store, 3), data[3])


def test_whatever_a_checksum_raises_reaches_the_one_who_waits(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path, checksums=True)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "check", lambda *_: [][0])
        with pytest.raises(StoreError, match=r"expert 0 of .*IndexError"):
            fetch(link, store, 0)
    assert torch.equal(fetch(link, store, 0), data[0])


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError("no room")])
def test_an_exception_in_a_reader_is_raised_where_it_is_waited_for(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store, data = write_store(tmp_path)
    fail_reads(monkeypatch, [error])
    with pytest.raises(StoreError, match=f"expert 1 of .*{type(error).__name__}: {error}"):
        fetch(link, store, 1)
    assert torch.equal(fetch(link, store, 1), data[1])


class Dies(BaseException):
    """What no reader handles."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_dies_is_replaced(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    fail_reads(monkeypatch, [Dies()])
    with pytest.raises(StoreError, match=r"expert 1 of .*its reader thread died"):
        fetch(link, store, 1)
    assert torch.equal(fetch(link, store, 1), data[1])
    for _ in range(1000):  # the dead one may take a moment to leave
        if len(readers()) == 1:
            return
        time.sleep(0.01)
    raise AssertionError(f"there are {readers()}")


def test_a_system_without_threads_says_so(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            fetch(link, store, 0)
    assert torch.equal(fetch(link, store, 0), data[0])


def test_closing_ends_loads_on_their_way_and_the_next_load_starts_anew(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    gate = Gate(monkeypatch)
    first, second = new_load(store, 0), new_load(store, 1)
    link.submit(first)
    gate.arrived(1)
    link.submit(second)
    waiting = in_a_thread(lambda: link.wait(second))
    closing = in_a_thread(link.close)
    with pytest.raises(StoreError, match=r"expert 1 of .*closed meanwhile"):
        waiting()
    gate.open()
    closing()
    assert not readers()
    assert not open_files()
    with pytest.raises(StoreError, match=r"expert 0 of .*closed meanwhile"):
        link.wait(first)
    assert torch.equal(fetch(link, store, 0), data[0])


def test_a_slow_reader_closes_the_files_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    link = Link(readers=1)
    assert torch.equal(fetch(link, store, 0), data[0])
    gate = Gate(monkeypatch)
    load = new_load(store, 1)
    link.submit(load)
    gate.arrived(1)
    (reader,) = readers()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", lambda self, timeout=None: None)  # time is up
        link.close()
    assert open_files()  # or the number could mean another file by now
    gate.open()
    reader.join(20)
    assert torch.equal(load.record[:SIZE], data[1])
    assert not open_files()


def test_a_link_that_nobody_holds_leaves_nothing(tmp_path: Path) -> None:
    store, data = write_store(tmp_path)
    link = Link()
    assert torch.equal(fetch(link, store, 0), data[0])
    assert readers()
    del link
    gc.collect()
    assert not readers()
    assert not open_files()


def test_bandwidth_counts_the_time_of_loads_on_their_way(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    store, _ = write_store(tmp_path)
    assert link.bandwidth is None
    gate = Gate(monkeypatch)
    load = new_load(store, 0)
    link.submit(load)
    gate.let(1)
    gate.arrived(2)
    clock[0] += 2.0
    assert link.bandwidth == 2048 / 2.0
    gate.open()
    link.wait(load)
    clock[0] += 5.0  # nothing is read in these
    assert link.bandwidth == SIZE / 2.0


def test_a_child_reads_for_itself_while_its_parent_does(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    gate = Gate(monkeypatch)
    load = new_load(store, 0)
    link.submit(load)
    gate.arrived(1)
    forking = in_a_thread(lambda: in_child(lambda: finish(link, load, data[0], gate, store, data)))
    gate.let(1)  # fork waits for the chunk, and then no other one is begun
    assert forking() == 0
    gate.open()
    link.wait(load)
    assert torch.equal(load.record[:SIZE], data[0])
    assert torch.equal(fetch(link, store, 2), data[2])


def finish(
    link: Link, load: Load, expected: torch.Tensor, gate: Gate, store: Store, data: Any
) -> bool:
    gate.open()
    link.wait(load)
    other = fetch(link, store, 1)
    opened = len(open_files())
    return torch.equal(load.record[:SIZE], expected) and torch.equal(other, data[1]) and opened == 1


def in_child(check: Any) -> int:
    """Fork, and give 0 if the check holds in the child."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_limited_link_takes_its_time_asleep(tmp_path: Path) -> None:
    size, limit = 1 << 22, 20e6
    store, data = write_store(tmp_path, experts=2, size=size)
    link = Link(limit=limit)
    loads = [Load(store, expert, new_records(1, store.layout)[1][0]) for expert in range(2)]
    began, worked = time.perf_counter(), time.process_time()
    for load in loads:
        link.submit(load)
    for load, one in zip(loads, data, strict=True):
        link.wait(load)
        assert torch.equal(load.record[:size], one)
    took, worked = time.perf_counter() - began, time.process_time() - worked
    assert took >= 2 * size / limit
    assert worked < took / 2
    link.limit = None
    began = time.perf_counter()
    again = Load(store, 0, new_records(1, store.layout)[1][0])
    link.submit(again)
    link.wait(again)
    assert time.perf_counter() - began < took / 2
    link.close()

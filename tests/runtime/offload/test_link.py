"""Reader threads: the right bytes, in the right order, and nothing left behind."""

import contextlib
import ctypes
import gc
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.runtime.errors import StoreError
from moecc.runtime.offload import load as load_module
from moecc.runtime.offload.link import Link, NewReaders
from moecc.runtime.offload.load import Load
from moecc.runtime.offload.readers import Readers
from moecc.runtime.offload.record import PAGE, Layout, new_records
from moecc.runtime.offload.store import Files, Read, Store
from tests.runtime.offload.stores import (
    KINDS,
    SIZE,
    Gate,
    fetch,
    in_a_thread,
    in_child,
    new_load,
    open_files,
    readers,
    write_store,
)


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
    kind=st.sampled_from(sorted(KINDS)),
    chunk=st.sampled_from([512, PAGE, 5000, 1 << 20]),
    direct=st.booleans(),
)  # fmt: skip
def test_any_range_of_a_file_comes_to_its_place(
    kind: str, parts: list[tuple[int, int, int]], chunk: int, direct: bool
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
        link = Link(new=KINDS[kind])
        link.submit(load)
        link.wait(load)
        assert torch.equal(load.record[:into], torch.cat(expected))
        assert (load.record[into:] == 7).all()  # nothing beside it was written
        assert link.bytes == sum(length for _, length, _ in parts)
        link.close()


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


def test_closing_while_a_load_is_submitted_is_an_error_and_never_garbage(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    start, closing = Link._start, list[Any]()

    def start_and_close(self: Link) -> None:
        start(self)
        if not closing:
            closing.append(in_a_thread(self.close))
            time.sleep(0.05)  # it must wait until readers know of the load

    monkeypatch.setattr(Link, "_start", start_and_close)
    load = new_load(store, 0)
    link.submit(load)
    with contextlib.suppress(StoreError):  # or it came first
        in_a_thread(lambda: link.wait(load))()
        assert torch.equal(load.record[:SIZE], data[0])
    closing[0]()


def test_a_load_that_was_stopped_is_not_there_after_closing(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = write_store(tmp_path)
    gate = Gate(monkeypatch)
    load = new_load(store, 0)
    link.submit(load)
    gate.arrived(1)
    link.stop([load])
    gate.open()
    while not link.bytes:  # its chunk ends, and nobody looks
        pass
    link.close()
    with pytest.raises(StoreError, match="meanwhile"):
        link.wait(load)


def test_an_interrupt_after_submitting_leaves_nobody_who_writes(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    gate, load = Gate(monkeypatch), new_load(store, 0)
    submit = link._readers.submit

    def interrupted(load: Load) -> None:
        submit(load)
        gate.arrived(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(link._readers, "submit", interrupted)
        submitting = in_a_thread(lambda: link.submit(load))
        gate.let(1)
        with pytest.raises(KeyboardInterrupt):
            submitting()
    load.record.fill_(9)
    gate.open()
    assert torch.equal(fetch(link, store, 1), data[1])
    assert (load.record == 9).all()


def test_two_threads_that_find_a_link_closed_begin_anew_together(
    tmp_path: Path, kind: NewReaders
) -> None:
    def slow(limit: float | None, files: Files) -> Readers:
        time.sleep(0.02)
        return kind(limit, files)

    store, data = write_store(tmp_path)
    link = Link(1, new=slow)
    link.close()
    fetching = [in_a_thread(lambda one=one: fetch(link, store, one)) for one in range(2)]
    for one, expected in zip(fetching, data, strict=False):
        assert torch.equal(one(), expected)
    assert len(readers()) == 1
    link.close()
    assert not readers()


def test_a_slow_reader_closes_the_files_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: NewReaders
) -> None:
    store, data = write_store(tmp_path)
    link = Link(1, new=kind)
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


def test_a_link_that_nobody_holds_leaves_nothing(tmp_path: Path, kind: NewReaders) -> None:
    store, data = write_store(tmp_path)
    link = Link(new=kind)
    assert torch.equal(fetch(link, store, 0), data[0])
    assert readers()
    del link
    gc.collect()
    assert not readers()
    assert not open_files()


def test_bandwidth_counts_the_time_of_loads_on_their_way(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = write_store(tmp_path)
    assert link.bandwidth is None
    gate = Gate(monkeypatch)
    load = new_load(store, 0)
    link.submit(load)
    gate.let(1)
    gate.arrived(2)
    before = link.bandwidth
    time.sleep(0.05)
    assert before is not None
    assert link.bandwidth is not None
    assert 2048 / link.bandwidth >= 2048 / before + 0.05
    gate.open()
    link.wait(load)
    time.sleep(0.01)  # nothing is read in these
    after = link.bandwidth
    time.sleep(0.01)
    assert link.bandwidth == after


def test_bytes_count_on_after_closing_and_in_a_child(link: Link, tmp_path: Path) -> None:
    store, _ = write_store(tmp_path)
    fetch(link, store, 0)
    link.close()
    assert link.bytes == SIZE
    fetch(link, store, 1)
    assert link.bytes == 2 * SIZE
    assert in_child(lambda: fetch(link, store, 2).any() and link.bytes == 3 * SIZE) == 0
    assert link.bytes == 2 * SIZE


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


def test_a_limited_link_takes_its_time_asleep(tmp_path: Path, kind: NewReaders) -> None:
    size, limit = 1 << 22, 20e6
    store, data = write_store(tmp_path, experts=2, size=size)
    link = Link(limit=limit, new=kind)
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


def test_native_readers_read_on_while_python_computes(tmp_path: Path) -> None:
    store, data = write_store(tmp_path, experts=1, size=1 << 22)
    link = Link(new=KINDS["native"])
    load = Load(store, 0, new_records(1, store.layout)[1][0])
    holding = ctypes.PyDLL(None).usleep  # and keeps the interpreter's lock meanwhile
    link.submit(load)
    for milliseconds in (50, 500, 5000):  # of a slow disk, or a busy machine
        if not load.done:
            holding(milliseconds * 1000)
            link._readers.look(load)
    assert torch.equal(load.record, data[0])
    link.close()


def test_who_watches_sees_every_chunk(link: Link, tmp_path: Path) -> None:
    store, _ = write_store(tmp_path)
    fetch(link, store, 0)
    began = time.perf_counter()
    with link.watched() as spans:
        fetch(link, store, 1)
    fetch(link, store, 2)
    first = store.reads[1][0].offset
    assert [(one.offset - first, one.length) for one in spans] == [
        (0, 2048),
        (2048, 2048),
        (4096, 904),
    ]
    assert all(began <= one.start <= one.end <= time.perf_counter() for one in spans)
    assert {one.file.name for one in spans} == {"experts.bin"}
    assert {one.thread for one in spans} == {"moecc-reader-0"}

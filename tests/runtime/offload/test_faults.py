"""Reads that fail: retried if that can help, else an error that says where; the next one works."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from moecc.runtime.errors import InputError, StoreError
from moecc.runtime.offload import load as load_module
from moecc.runtime.offload import native_readers
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.record import PAGE, Layout, new_records
from moecc.runtime.offload.store import Files, Read, Store
from tests.runtime.offload.stores import (
    SIZE,
    fail_reads,
    fetch,
    readers,
    write_store,
)

EIO = OSError(errno.EIO, "Input/output error")


def test_memory_that_there_is_not_is_refused() -> None:
    layout = Layout.of({"gate_up": ((1 << 40,), torch.uint8)})
    for count in (1 << 20, 1 << 60):
        with pytest.raises(InputError, match=rf"cannot allocate .* for {count} experts"):
            new_records(count, layout)


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
    monkeypatch.setattr(native_readers, "BY_HAND", True)
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
    monkeypatch.setattr(native_readers, "BY_HAND", True)
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


def test_a_damaged_file_is_read_twice_and_then_an_error(link: Link, tmp_path: Path) -> None:
    store, data = write_store(tmp_path, checksums=True)
    with store.reads[1][0].file.open("r+b") as opened:
        opened.seek(store.reads[1][0].offset + SIZE - 1)
        opened.write(bytes([int(data[1][-1]) ^ 1]))
    with pytest.raises(StoreError, match=r"expert 1 of .* has checksum"):
        fetch(link, store, 1)
    assert link.bytes == 2 * SIZE
    assert torch.equal(fetch(link, store, 2), data[2])


def test_whatever_a_checksum_raises_reaches_the_one_who_waits(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path, checksums=True)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "check", lambda *_: [][0])
        patch.setattr(native_readers, "BY_HAND", True)
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

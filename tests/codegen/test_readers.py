"""The queue of reader threads: under the thread sanitizer, and call by call."""

import subprocess
import sys
from pathlib import Path

import pytest

from moecc.codegen.native.build import find_compiler
from moecc.codegen.native.readers import SOURCE, load_readers
from moecc.runtime.offload import native_readers
from moecc.runtime.offload.load import CHUNK
from moecc.runtime.offload.native_readers import NativeReaders
from moecc.runtime.offload.store import Files
from tests.runtime.offload.stores import new_load, write_store

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="native code is built on Linux"
)
FINISH = "  std::shared_ptr<Load> load = queue->loads.at(task->id);\n  if (failed)"
UNLOCKED = (
    f"  Lock lock(queue->mutex);\n{FINISH}",
    f"  std::mutex own;\n  Lock lock(own);\n{FINISH}",
)
"""Each thread counts its chunks with a lock of its own."""


@pytest.mark.parametrize("change", [None, UNLOCKED], ids=["as it is", "planted"])
def test_threads_do_not_race(tmp_path: Path, change: tuple[str, str] | None) -> None:
    source = SOURCE.read_text()
    if change is not None:
        assert change[0] in source
        source = source.replace(*change)
    (tmp_path / "readers.cpp").write_text(source)
    program, driver = tmp_path / "drive", Path(__file__).with_name("drive_readers.cpp")
    flags = ("-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-Wall", "-Wextra", "-Werror")
    name = f'-DREADERS="{tmp_path / "readers.cpp"}"'
    command = [*find_compiler(), *flags, name, "-o", program, driver, "-pthread"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [program, tmp_path / "experts.bin"], capture_output=True, text=True, check=False
    )
    found = "data race" in done.stderr
    assert (done.returncode != 0, found) == (change is not None,) * 2, done.stderr[:2000]
    if change is None:
        assert done.stdout == "0 bytes are wrong\n"


@pytest.mark.parametrize("end", ["stop", "close"])
def test_a_wrong_record_that_nobody_wants_any_more_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(native_readers, "BY_HAND", True)
    store, _ = write_store(tmp_path, checksums=True)
    readers = NativeReaders(load_readers(), None, Files())
    load, queue, task = new_load(store, 0), readers._queue, native_readers._Task()
    readers.submit(load)
    assert readers._library.moecc_readers_work(queue, task) == 1  # a chunk to read, which stays 0
    assert readers._library.moecc_readers_finish(queue, task, False) == 2  # a record to check
    if end == "stop":
        readers.stop(load)
    else:
        readers.drop()
    assert not load.done  # somebody is at it
    readers._library.moecc_readers_checked(queue, task, True, CHUNK)
    readers.look(load)
    assert load.done
    assert load.failed

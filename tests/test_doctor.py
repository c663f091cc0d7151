"""`moecc doctor` says what works, and finds what does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moecc import capture
from moecc.codegen.native import build
from moecc.codegen.native.readers import load_readers
from moecc.doctor import blocks, compiler, gpus, memory, storage, versions
from moecc.doctor.check import Check
from moecc.doctor.examine import GROUPS
from moecc.passes.ir import Miss
from moecc.runtime.errors import NoCompiler, StoreError

ROOT = Path(__file__).parent.parent


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_least_versions_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}>={least}' in text for name, least in versions.LEAST.items())


def test_every_file_of_the_folder_is_a_group() -> None:
    files = {file.stem for file in (ROOT / "moecc" / "doctor").glob("*.py")}
    groups = [group.__name__ for group in GROUPS]
    assert files - {"__init__", "check", "examine"} == set(groups)
    assert len(groups) == len(set(groups))


def test_old_and_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    monkeypatch.setattr(capture, "_missing", [Miss(where="capture", why="a name is gone")])
    found = by_name(versions.versions())
    assert found["transformers"].status == "broken"
    assert found["transformers"].fix == "pip install -U 'transformers>=5.20'"
    assert (found["triton"].status, found["triton"].fix) == ("limited", "pip install 'triton'")
    assert found["capture"].found.startswith("a name is gone; blocks are found by structure")
    assert found["torch"].status == "ok"


def test_a_machine_without_a_compiler_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise NoCompiler("no C++ compiler works here")

    monkeypatch.setattr(compiler, "find_compiler", none)
    (found,) = compiler.compiler()
    assert found.status == "limited"
    assert "torch's operators run instead" in found.found
    assert "apt install g++" in found.fix


def test_the_compiler_that_builds_kernels_is_told() -> None:
    found = by_name(compiler.compiler())
    assert build.find_compiler()[0] in found["C++ compiler"].found
    assert found["OpenMP"].found.endswith(f"torch has {torch.get_num_threads()}")


def test_the_disk_is_read_as_the_engine_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_readers()  # which stays
    before = list((tmp_path / "moecc").iterdir())
    found = by_name(storage.storage())
    assert str(tmp_path / "moecc") in found["cache folder"].found
    assert found["disk"].status == "limited" or (found["disk"].measured or 0) > 1e6
    assert list((tmp_path / "moecc").iterdir()) == before, "what was written is taken away"


def test_a_cache_folder_of_others_and_a_disk_that_fails_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "moecc").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def damaged(*_: Any) -> float:
        raise StoreError("expert 3 is short")

    monkeypatch.setattr(storage, "store_bandwidth", damaged)
    found = by_name(storage.storage())
    assert found["cache folder"].status == "limited"
    assert "XDG_CACHE_HOME" in found["cache folder"].fix
    assert found["disk"].status == "broken"
    assert "expert 3 is short" in found["disk"].found


def test_memory_is_measured_where_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "read_bandwidth", lambda seconds: 25e9)
    monkeypatch.setattr(memory, "product_rate", lambda seconds: 80e9)
    monkeypatch.setattr(memory, "memory_bytes", lambda: (16 << 30, 8 << 30))
    found = by_name(memory.memory())
    assert found["memory"].found == "8.6 of 17.2 GB available, read at 25.0 GB/s"
    assert (found["memory"].measured, found["products"].measured) == (25e9, 80e9)
    monkeypatch.setattr(memory, "memory_bytes", lambda: (16 << 30, 1 << 30))
    found = by_name(memory.memory())
    assert found["memory"].status == "limited"
    assert "products" not in found


def test_memory_is_what_the_kernel_says() -> None:
    total, free = memory.memory_bytes()
    assert 0 < free <= total


@pytest.mark.parametrize(("target", "status"), [((9, 0), "ok"), ((7, 5), "limited")])
def test_a_gpu_is_told_by_its_target(
    target: tuple[int, int], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda number: target,
        "get_device_name": lambda number: "a board",
        "mem_get_info": lambda number: (1 << 20, 80 << 30),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = by_name(gpus.gpus())
    assert found["GPU 0"].status == status
    assert "a board, sm_" in found["GPU 0"].found
    assert found["GPU 0 link"].status == "limited", "too little memory to measure"


def test_a_block_is_compiled_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = by_name(blocks.blocks())
    found = checks["MoE block on cpu"]
    assert found.status == "ok"
    assert "mul(silu(gate), up) float32 E4 H64 I48 cpu" in found.found
    monkeypatch.setattr(blocks, "_TOLERANCE", -1.0)
    found = by_name(blocks.blocks())["MoE block on cpu"]
    assert found.status == "broken"
    assert "its output is off by" in found.found

"""The benchmark of lent experts, at a size of seconds."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import llama_cpp, llama_mmap, offload, offload_sweep
from moecc.runtime.offload import profile as profiles

ARGUMENTS = """
    --inner eager --widen 1 --new-tokens 6 --rounds 2 --memory 50% --llama
    --json out.json --plot plots --timeline timeline.json
"""
CONTENDERS = "no cache,lru,lru + prefetch"


def test_tables_plots_and_timeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llama_mmap, "GROUPS", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["offload", *ARGUMENTS.split(), "--contenders", CONTENDERS])
    offload.main()
    told = json.loads(Path("out.json").read_text())
    rows = {row["contender"]: row for row in told["results"]}
    assert list(rows) == ["no cache", "lru", "lru + prefetch", "foreseen", "oracle", "bound"]
    assert rows["no cache"]["hit_rate"] == 0 < rows["lru"]["hit_rate"]
    assert rows["lru"]["megabytes_per_token"] < rows["no cache"]["megabytes_per_token"]
    assert all(rows[name]["same_tokens"] for name in ("no cache", "lru", "lru + prefetch"))
    for name in ("lru", "lru + prefetch"):
        parts = ("experts", "model", "demand_wait", "prefetch_wait", "overhead")
        decoded = sum(rows[name][part] for part in parts) / 1e3
        slowest, fastest = rows[name]["spread"]
        assert 0.99 / fastest <= decoded <= 1.01 / slowest
    assert rows["lru"]["prefetch_wait"] == 0
    printed = capsys.readouterr().out
    assert "all gave the same tokens" in printed
    assert "llama.cpp is left out: " in printed
    assert {file.name for file in Path("plots").iterdir()} == {"speed.svg", "hits.svg"}
    events = json.loads(Path("timeline.json").read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert tracks >= {"model", "moecc-reader-0"}
    spans = [event for event in events if event["ph"] == "X"]
    assert all(span["dur"] >= 0 <= span["ts"] for span in spans)
    assert sum(span["name"].startswith("block ") for span in spans) >= 6 * 6


@pytest.mark.skipif(not llama_cpp.installed(), reason="needs pip install moecc[llama]")
@pytest.mark.skipif(not os.access(llama_mmap.GROUPS, os.W_OK), reason="needs memory cgroups")
def test_llama_stays_in_its_memory_and_reads_the_file_again(tmp_path: Path) -> None:
    folder = shutil.copytree(offload.REFERENCE, tmp_path / "model")
    groups = set(llama_mmap.GROUPS.iterdir())
    made = llama_mmap.run(folder, 8 << 20, [1, 2, 3], 4, 2)
    assert (len(made.rates), len(made.tokens)) == (2, 4)
    assert 8 << 20 < made.peak <= made.own + (8 << 20)
    assert made.read > 1 << 20, "the file does not fit"
    assert set(llama_mmap.GROUPS.iterdir()) == groups


def test_a_link_as_slow_as_a_gpus_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = "--inner eager --widen 1 --new-tokens 3 --memory 50% --folder . --json out.json"
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments.split()])
    slow = replace(offload_sweep.MODELS[-1], parameters=2e11)  # so that the link is fast beside it
    monkeypatch.setattr(offload_sweep, "MODELS", (slow,))
    offload_sweep.main()
    cells = json.loads(Path("out.json").read_text())["results"]
    assert [cell["contender"] for cell in cells] == list(offload_sweep.CONTENDERS)
    assert all(cell["same_tokens"] for cell in cells)
    read = {cell["contender"]: cell["megabytes_per_token"] for cell in cells}
    assert read["no cache"] > read["lru"] > 0
    rates = {cell["contender"]: cell["tokens_per_second"] for cell in cells}
    assert cells[-1]["over_on_demand"] == pytest.approx(rates["lfu + prefetch"] / rates["lfu"])
    assert "copying takes" in capsys.readouterr().out


def test_ratios_are_those_of_published_shapes() -> None:
    gpu = profiles.read(offload_sweep.GPU)
    mixtral, *_ = offload_sweep.MODELS
    seconds = 32 * 2 * 3 * 4096 * 14336 * 2 / 16e9  # two experts of 352 MB in 32 layers
    computed = 12.9e9 * 2 / gpu.compute.bandwidth
    assert 0.8 * seconds / computed < mixtral.ratio(gpu) < seconds / computed

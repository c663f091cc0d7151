"""Recording, replaying and planning as a person does it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moecc import cli, tracing
from moecc.runtime.offload.recording import read

REFERENCE = Path(__file__).parent.parent / "benchmarks" / "reference"
PROMPT = "In the beginning God created the heaven and the earth."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a run of 12 tokens with a quarter of the experts."""
    file = tmp_path_factory.mktemp("trace") / "t.jsonl"
    options = {"expert_memory": "25%", "policy": "lookahead", "inner": "eager"}
    tracing.run(str(REFERENCE), PROMPT, 12, file, options, "auto", quiet=True)
    return file


def invoke(*args: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(one) for one in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def replayed(*args: str | Path) -> dict[str, Any]:
    return json.loads(invoke("replay", *args, "--json"))


def test_a_runs_own_trace_gives_what_its_engine_counted(run: Path) -> None:
    shown = replayed(run, "--policy", "lru", "--predict", "none")
    pools = shown["run"]["pools"]
    assert shown["agrees"] is True
    assert [pool["slots"] for pool in pools] == [8] * 6
    for name in ("asked", "hits", "predicted"):
        assert shown["own"][name] == sum(pool[name] for pool in pools) > 0


def test_bounds_are_bounds(run: Path) -> None:
    rows = replayed(run, "--memory", "25%,50%")["rows"]
    loads = {
        (row["memory"], row["policy"], row["predictions"]): row["misses"] + row["predicted"]
        for row in rows
    }
    hits = {(row["memory"], row["policy"], row["predictions"]): row["hits"] for row in rows}
    for memory, policy, predictions in hits:
        assert loads[memory, "belady", "none"] <= loads[memory, policy, predictions]
        assert hits[memory, policy, predictions] <= hits[memory, policy, "perfect"]
        assert hits["25%", policy, predictions] <= hits["50%", policy, predictions]
    assert loads["25%", "belady", "perfect"] == loads["25%", "belady", "none"]


def test_a_file_that_counts_otherwise_is_a_problem(run: Path, tmp_path: Path) -> None:
    lines = run.read_text().splitlines()
    about = json.loads(lines[0])
    about["pools"][2]["hits"] += 1
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([json.dumps(about), *lines[1:]]))
    assert "does not count" in invoke("replay", other, status=1)


def test_a_file_is_read_as_it_was_written(run: Path, tmp_path: Path) -> None:
    from moecc.runtime.offload.recording import write

    write(read(run), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == run.read_text()

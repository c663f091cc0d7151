"""Recording, replaying and planning as a person does it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import moecc
from moecc import cli, tracing
from moecc.generate import compiled
from moecc.report_html import caching
from moecc.runtime.errors import OptionError, StoreError
from moecc.runtime.offload.recording import read, write

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


def test_the_passes_of_a_report_sum_up_to_what_the_engine_counted(run: Path) -> None:
    recording = read(run)
    passes, pools = caching.gather(recording).passes, recording.pools
    assert len(passes) == 12
    for name in ("asked", "hits"):
        assert sum(getattr(one, name) for one in passes) == sum(getattr(one, name) for one in pools)
    early = sum(one.early_bytes for one in passes)
    assert early == sum(pool.predicted for pool in pools) * recording.blocks[0].size > 0


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


def test_a_shared_pool_has_the_slots_of_all_and_a_better_bound(run: Path) -> None:
    rows = replayed(run, "--pool", "own,shared", "--policy", "belady", "--predict", "none")["rows"]
    assert [(row["pool"], row["slots"]) for row in rows] == [("own", [8] * 6), ("shared", [48])]
    assert rows[0]["misses"] >= rows[1]["misses"] > 0


def test_a_file_that_counts_otherwise_is_a_problem(run: Path, tmp_path: Path) -> None:
    lines = run.read_text().splitlines()
    about = json.loads(lines[0])
    about["pools"][2]["hits"] += 1
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([json.dumps(about), *lines[1:]]))
    assert "does not count" in invoke("replay", other, status=1)


def test_a_file_is_read_as_it_was_written(run: Path, tmp_path: Path) -> None:
    write(read(run), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == run.read_text()


def planned(*args: str | Path) -> dict[str, Any]:
    return json.loads(invoke("plan", *args, "--json"))


def test_a_plan_is_what_load_gives(run: Path) -> None:
    for more in ([], ["--trace", run]):
        shown = planned(REFERENCE, "--memory", "30%", *more)
        trace = {"trace": run} if more else {}
        model = moecc.load(REFERENCE, expert_memory="30%", **trace)
        report = moecc.report(model).experts
        assert report is not None
        assert [block["slots"] for block in shown["blocks"]] == [
            block["slots"] for block in report.blocks
        ]
        assert shown["slot_bytes"] == report.memory_bytes
        assert shown["expert_bytes"] == report.total_bytes


def test_a_plan_with_a_trace_is_told_by_its_replay(run: Path) -> None:
    shown = planned(REFERENCE, "--memory", "25%", "--trace", run, "--profile", "a100-pcie4")
    rows = replayed(
        run, "--memory", "25%", "--by-benefit", "--policy", "lru,belady", "--predict", "none"
    )["rows"]
    assert shown["hits"] == [row["hit_rate"] for row in rows]
    (rate,) = shown["rates"]
    assert 0 < rate["worst"]["on_demand"] < rate["best"]["on_demand"] <= rate["best"]["hidden"]


def test_a_model_type_is_planned_at_its_default_size() -> None:
    full = planned("qwen3_moe", "--memory", "50%", "--quantize", "int4")
    assert full["blocks"][0]["demand"]["experts"] == 128
    (half,) = {block["slots"] for block in full["blocks"]}
    assert half == 64
    assert full["expert_bytes"] > 1e9
    text = invoke("plan", "qwen3_moe", "--memory", "50%")
    assert "tokens/s  1/(" in text


def test_wrong_use_of_plan_and_replay_says_what_to_do(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, message in [
        (("plan", "qwen3_moe", "--memory", "1"), "that is the smallest that works"),
        (("plan", "llama", "--memory", "50%"), "has no experts"),
        (("plan", "qwen3_moe", "--memory", "50%", "--trace", run), "record one of its own"),
        (("plan", "qwen3_moe", "--memory", "50%", "--profile", "abacus"), "no profile 'abacus'"),
        (("replay", run, "--policy", "fifo"), "--policy 'fifo' is not one of"),
        (("replay", run, "--pool", "one"), "--pool 'one' is not one of"),
        (("replay", run, "--predict", "governed"), "governed needs a --profile"),
        (("replay", REFERENCE / "config.json"), "is no trace of `moecc trace`: line 1"),
        (("replay", "nowhere.jsonl"), "cannot read the trace 'nowhere.jsonl'"),
    ]:
        monkeypatch.setattr("sys.argv", ["moecc", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_load_refuses_a_trace_that_is_none() -> None:
    with pytest.raises(OptionError, match="'trace' is 'nowhere'; allowed: None or a file"):
        moecc.load(REFERENCE, expert_memory="25%", trace="nowhere")
    with pytest.raises(StoreError, match=r"config.json' is no trace of `moecc trace`: line 1"):
        moecc.load(REFERENCE, expert_memory="25%", trace=REFERENCE / "config.json")


def test_a_measured_profile_simulates_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moecc import profiling

    monkeypatch.setattr(
        profiling, "compiled", lambda model, options: compiled(model, options | {"inner": "eager"})
    )
    file = tmp_path / "here.toml"
    profiling.run(str(REFERENCE), PROMPT, 8, file, "auto", quiet=True)
    shown = replayed(run, "--profile", file, "--policy", "lru", "--predict", "none,governed")
    simulated = [row["simulated"] for row in (shown["own"], *shown["rows"])]
    assert shown["agrees"] is True
    assert all(one["tokens"] == 11 and one["decode_rate"] > 0 for one in simulated)
    text = invoke("replay", run, "--profile", "a100-pcie4")
    assert "tokens/s" in text
    assert "belady" in text

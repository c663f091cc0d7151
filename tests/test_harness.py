"""The harness of benchmarks: scenarios, records, what changed, and the page that they become."""

import json
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import model, page, scale
from benchmarks.harness import (
    __main__ as harness,
)
from benchmarks.harness import (
    compare,
    contenders,
    machine,
    markdown,
    plots,
    record,
    rows,
    runner,
    scenario,
)
from benchmarks.harness.errors import ScenarioError
from benchmarks.harness.machine import Machine
from benchmarks.harness.record import Record, Value
from benchmarks.model_contenders import Generation, Unable

HERE = Machine(cpu="a processor", cores=2, load=0.5, read_bandwidth=3e10, versions={"torch": "2"})
ONE = Record(
    suite="kernels", scenario="small", contender="moecc", cell={"tokens": 1},
    values={"milliseconds": Value(median=2.0, spread=(1.9, 2.2))}, how="emit(spec).run",
    command="python -m benchmarks.kernels", quick=False, peak_memory=3_000_000,
    date="2026-01-02 03:04", commit="abc", machine=HERE,
)  # fmt: skip
SUITE = """
    about = "Time nothing."
    contenders = ["moecc", "eager", "vLLM"]
    [programs.nothing]
    cell = ["tokens"]
    less = ["milliseconds"]
    right = "same"
    [[scenario]]
    name = "small"
    program = "nothing"
    options = "--tokens 1"
    quick = "--tokens 2"
"""
PROGRAM = '''
    """Time nothing."""
    import json, sys
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    row = {"tokens": int(given["--tokens"]), "spread": [1, 3], "milliseconds": 2.0}
    theirs = row | {"contender": "eager", "same": False}
    found = {"machine": "held to less", "bandwidth": 1e9}
    found["results"] = [row | {"contender": "moecc", "same": SAME}, theirs]
    open(given["--json"], "w").write(json.dumps(found))
'''


def slower(times: float, spread: float = 0.1) -> Record:
    value = Value(median=2.0 * times, spread=(2.0 * times - spread, 2.0 * times + spread))
    return replace(ONE, values={"milliseconds": value})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Give a folder of scenarios in which one suite runs one program, which is right or not."""
    folder = tmp_path / "benchmarks" / "scenarios"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    monkeypatch.setattr(scenario, "FOLDER", folder)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "measure_apart", lambda rates: HERE)

    def write(suite: str = SUITE, right: bool = True) -> Path:
        (folder / "nothing.toml").write_text(textwrap.dedent(suite))
        program = textwrap.dedent(PROGRAM).replace("SAME", str(right))
        (folder.parent / "nothing.py").write_text(program)
        return tmp_path / "out.jsonl"

    return write


def test_every_suite_can_be_read_and_every_contender_has_a_command() -> None:
    for name in scenario.names():
        suite = scenario.read(name)
        assert suite.about
        assert any(one.quick is not None for one in suite.scenarios)
        assert all(contenders.find(one).command for one in suite.contenders)


@pytest.mark.parametrize(
    ("suite", "program", "file"),
    [
        ("kernels", "kernels", "kernels-avx512.json"),
        ("kernels", "layer", "layer-avx2.json"),
        ("model", "decoder", "decoder-avx2-int8.json"),
        ("offload", "offload", "offload.json"),
        ("quality", "quality", "quality.json"),
        ("compile", "compile_time", "compile-time.json"),
        ("static_gpu", "static_gpu", "static-gpu-triton-3.7.1.json"),
    ],
)
def test_what_programs_have_written_is_read_as_the_suites_say(
    suite: str, program: str, file: str
) -> None:
    found = rows.read_rows(page.RESULTS / file, scenario.read(suite).programs[program])
    assert all(contenders.find(row["contender"]).command for row in found)
    values = rows.values_of(found[0], scenario.read(suite).programs[program])
    spreads = {name: one.spread for name, one in values.items() if one.spread}
    assert values
    assert all(low <= values[name].median <= high for name, (low, high) in spreads.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"nothing"', '"other"'), r"names program 'other'; there are \['nothing'\]"),
        (("quick", "quik"), r"scenario 'small' in nothing.toml has unknown keys \['quik'\]"),
        (("[programs.nothing]", "[programs.gone]"), "there is no benchmarks/gone.py"),
        (("options =", "#"), r"scenario 'small' in nothing.toml lacks \['options'\]"),
        (("about =", "about"), "nothing.toml is not TOML"),
    ],
)
def test_a_scenario_that_makes_no_sense_is_named(checkout, change, said) -> None:
    checkout(SUITE.replace(*change))
    with pytest.raises(ScenarioError, match=said):
        scenario.read("nothing")


def test_an_unknown_contender_is_told_where_to_say_how_it_is_run() -> None:
    with pytest.raises(ScenarioError, match=r"'theirs' is not in contenders.toml: add a table"):
        contenders.find("theirs")
    assert contenders.find("eager bf16").name == "eager"
    assert contenders.find("eager + inductor").name == "eager + inductor"


def test_a_run_makes_a_record_of_each_row_and_of_each_absent_contender(
    checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkout()
    assert harness.main(["nothing", "--json", str(file)]) == 0
    ours, theirs, absent = record.read(file)
    assert ours.values == {"milliseconds": Value(median=2.0, spread=(1, 3), less=True)}
    seen = replace(HERE, cpu="held to less", read_bandwidth=1e9)
    assert (ours.cell, ours.machine, ours.quick) == ({"tokens": 1}, seen, False)
    assert ours.command == "python -m benchmarks.nothing --tokens 1"
    assert (ours.peak_memory or 0) > 1 << 20
    assert (theirs.values, theirs.wrong) == ({}, "same: no")
    assert (absent.contender, absent.skipped) == ("vLLM", "needs a CUDA device")
    told = capsys.readouterr().out
    assert "eager: no time, same: no" in told
    assert "vLLM: skipped, needs a CUDA device" in told


def test_wrong_results_of_ours_fail_a_quick_run_and_have_no_time(checkout) -> None:
    file = checkout(right=False)
    assert harness.main(["nothing", "--quick", "--json", str(file)]) == 1
    ours, *_ = record.read(file)
    assert (ours.cell, ours.values, ours.quick) == ({"tokens": 2}, {}, True)


def test_a_scenario_alone_leaves_the_records_of_others_in_the_file(
    checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkout(SUITE + SUITE[SUITE.index("    [[scenario]]") :].replace("small", "large"))
    assert harness.main(["nothing", "--json", str(file)]) == 0
    before = record.read(file)
    assert harness.main(["nothing", "--scenario", "small", "--json", str(file)]) == 0
    assert sorted(one.key for one in record.read(file)) == sorted(one.key for one in before)
    with pytest.raises(SystemExit):
        harness.main(["nothing", "--scenario", "other"])
    assert "nothing has no scenario 'other'" in capsys.readouterr().err


def test_a_program_takes_its_own_options_or_fails_with_what_it_said(
    checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkout()
    assert harness.main(["nothing", "--tokens", "7", "--json", str(file)]) == 0
    assert record.read(file)[0].cell == {"tokens": 7}
    assert harness.main(["nothing", "--quick", "--tokens", "many"]) == 1
    assert "ValueError: invalid literal for int()" in capsys.readouterr().out


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "made" / "one.jsonl"
    record.write([ONE, replace(ONE, contender="eager")], file)
    assert record.read(file) == [ONE, replace(ONE, contender="eager")]
    file.write_text(file.read_text() + json.dumps({"suite": "kernels"}))
    with pytest.raises(ValueError, match=r"one.jsonl, line 3 is not a record"):
        record.read(file)


def test_only_what_leaves_both_spreads_has_changed() -> None:
    assert compare.compare([ONE], [slower(1.05)]) == ["nothing changed beyond noise"]
    assert compare.compare([ONE], [slower(1.5)]) == [
        "WORSE: kernels small, tokens 1, moecc: milliseconds 2 -> 3, 1.50x"
    ]
    assert compare.compare([ONE], [slower(0.5)])[0].startswith("better: ")
    rate = Value(median=10.0, less=False)
    pair = [replace(ONE, values={"rate": replace(rate, median=one)}) for one in (10.0, 13.0)]
    (line,) = compare.compare(*[[one] for one in pair])
    assert line.startswith("better: ")
    assert line.endswith("1.30x (no spread: noise of 10% assumed)")
    assert compare.change(rate, replace(rate, median=10.9)) is None


def test_what_appeared_went_or_became_wrong_is_told() -> None:
    other = replace(ONE, contender="eager")
    wrong = replace(ONE, values={}, wrong="other tokens")
    assert compare.compare([ONE, other], [wrong]) == [
        "wrong: kernels small, tokens 1, moecc: other tokens",
        "gone: kernels small, tokens 1, eager",
    ]
    assert compare.compare([ONE], [replace(ONE, scenario="new")])[0].startswith("new: ")


def test_a_table_has_commands_reasons_and_ratios() -> None:
    value = {"milliseconds": Value(median=3.0)}
    theirs = replace(ONE, contender="eager", how="eager experts", values=value)
    absent = replace(ONE, contender="vLLM", cell={}, values={}, skipped="needs a CUDA device")
    text = markdown.page([ONE, theirs, absent])
    assert "`python -m benchmarks.kernels`: 2026-01-02 03:04, commit abc, a processor" in text
    assert "| 1 | moecc | 2 (1.9 to 2.2) | 3 |" in text
    assert "| 1 | eager | 3, 1.50x | 3 |" in text
    assert "|  | vLLM | skipped: needs a CUDA device |" in text
    assert "- eager: `eager experts`" in text
    with pytest.raises(ValueError, match="quick records are not published"):
        markdown.page([replace(ONE, quick=True)])


def test_each_measured_field_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (file,) = plots.plot([ONE, replace(ONE, contender="eager", values={})], tmp_path)
    drawn = file.read_text()
    assert "<!-- small, 1, moecc -->" in drawn
    assert "eager" not in drawn


def test_the_page_is_what_the_records_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert page.page() == page.PAGE.read_text(), "run python -m benchmarks.page"
    template = tmp_path / "page.md"
    template.write_text("<!-- table pie kernels-avx2.json -->\n")
    monkeypatch.setattr(page, "TEMPLATE", template)
    with pytest.raises(ValueError, match="no kind of table 'pie'"):
        page.page()
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    record.write([ONE], tmp_path / "kernels.jsonl")
    template.write_text("before\n<!-- suite kernels -->\nafter\n")
    assert "| 1 | moecc | 2 (1.9 to 2.2) | 3 |" in page.page()


def test_an_exponent_is_fitted_with_its_error() -> None:
    sizes = [1, 2, 4, 8]
    exact = scale.fit(sizes, [3 * size**1.5 for size in sizes])
    assert (exact.exponent, exact.error) == (pytest.approx(1.5), pytest.approx(0, abs=1e-9))
    noisy = scale.fit(sizes, [3, 7, 11, 25])
    assert 0.9 < noisy.exponent < 1.1
    assert 0 < noisy.error < 0.2


class Fake:
    """A guest that gives the same tokens each time, or cannot run."""

    def __init__(self, tokens: tuple[int, ...] = (), unable: str = "") -> None:
        self.tokens, self.unable, self.asked = tokens, unable, 0

    def run(self, prompts, steps: int) -> Generation:
        self.asked += 1
        if self.unable:
            raise Unable(self.unable)
        seconds = float(self.asked)  # the first call, which is not timed, would be the fastest
        return Generation(
            prefill=seconds, step=seconds / 10, tokens=(self.tokens[:steps],) * len(prompts),
            peak_memory=10 * self.asked,
        )  # fmt: skip


def test_a_model_with_other_tokens_has_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = tuple(range(8)), (0, 1, 2, 3, 4, 5, 6, 9)
    guests = {
        model.JUDGE: Fake(right), "moecc": Fake(right), "llama.cpp": Fake(wrong),
        "vLLM": Fake(unable="no batches"),
    }  # fmt: skip
    rows = {row.contender: row for row in model.measure(guests, [[1, 2], [3, 4]], 8, 3)}
    ours, theirs = rows["moecc"], rows["llama.cpp"]
    assert (ours.prefill_rate, ours.decode_rate) == (pytest.approx(4 / 3), pytest.approx(20 / 3))
    assert ours.spread == {"prefill_rate": (1, 2), "decode_rate": (5, 10)}
    assert (ours.peak_memory, guests["moecc"].asked, guests["vLLM"].asked) == (40, 4, 1)
    assert (theirs.prefill_rate, theirs.wrong) == (None, "other tokens than transformers eager")
    assert rows["vLLM"].skipped == "no batches"
    assert "other tokens" in capsys.readouterr().out


def test_prompts_are_stretches_of_the_models_text() -> None:
    prompts = model.prompts_of(model.REFERENCE, 3, 16)
    assert [len(one) for one in prompts] == [16] * 3
    assert len({tuple(one) for one in prompts}) == 3

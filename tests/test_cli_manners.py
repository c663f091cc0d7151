"""How the command line behaves towards terminals, pipes, shells and Ctrl-C."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command

from moecc import arguments, bench_cli, cli, inspection, planning, terminal
from moecc.plain import plain
from moecc.runtime.errors import ModelError
from moecc.tiny_families import FAMILIES
from tests.cli_page import RESULTS, check

COMMANDS: dict[str, Any] = getattr(get_command(cli.app), "commands", {})


def status(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr("sys.argv", ["moecc", *args])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_json(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, name, "--help") == 0
    told = capsys.readouterr().out
    assert f"Examples: moecc {name}" in told
    assert "--json" in told


def test_ctrl_c_is_130_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect", interrupted)
    assert status(monkeypatch, "passes", "qwen3_moe") == 130
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err


def test_our_errors_are_a_line_on_stderr_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> Any:
        raise ModelError("there is [no] model")

    monkeypatch.setattr(planning, "run", failing)
    assert status(monkeypatch, "plan", "mixtral", "--memory", "50%", "--json") == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "moecc: there is [no] model\n")


LONG = """
import typer
from moecc import terminal

def main(as_json: bool = False):
    terminal.show(["x" * 1000] * 1000, as_json, lambda lines, console: console.print(lines))

typer.run(main)
"""


@pytest.mark.parametrize("more", [(), ("--as-json",)])
def test_a_closed_pipe_is_no_traceback(more: tuple[str, ...]) -> None:
    """As in `moecc kernels MODEL --source | head -1`."""
    command = [sys.executable, "-c", LONG, *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as made:
        assert made.stdout is not None
        assert made.stderr is not None
        made.stdout.close()
        assert made.stderr.read() == b""
    assert made.returncode == 1


def diff(text: str) -> inspection.Diff:
    return inspection.Diff(name="polish", diff=text)


@pytest.mark.parametrize("wanted", [True, False])
def test_colours_are_for_terminals_that_want_them(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if not wanted:
        monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    inspection.print_diff(diff("+new\n-old"), terminal.stdout())
    assert ("\x1b[32m+new" in out.getvalue()) is wanted
    assert "new" in out.getvalue()


def test_a_pipe_gets_no_colours_and_no_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with terminal.live_line("working") as tell:
        tell("still working")
    inspection.print_diff(diff("+new" + " long" * 40), terminal.stdout())
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out == "+new" + " long" * 40 + "\n"


def test_a_terminal_sees_what_is_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    monkeypatch.setattr(terminal, "stderr", lambda quiet: console)
    with terminal.live_line("working") as tell:
        tell("still working")
    assert "still working" in out.getvalue()


def test_what_is_printed_beside_a_line_goes_where_it_was_meant_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=60)
    monkeypatch.setattr(terminal, "stderr", lambda quiet: screen)
    with terminal.live_line("working"):
        print("a token")  # noqa: T201
    assert capsys.readouterr().out == "a token\n"


def test_a_shell_completes_models_passes_schemes_and_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "model.py").touch()
    (tmp_path / "qwen" / "model.gguf").touch()
    (tmp_path / "qwen" / "notes.txt").touch()
    assert arguments.complete_model("qwen3_m") == ["qwen3_moe"]
    assert arguments.complete_model("qw")[-1] == "qwen/"
    assert arguments.complete_model("qwen/") == ["qwen/model.gguf", "qwen/model.py:"]
    assert arguments.complete_model("./qw") == ["./qwen/"]
    assert set(FAMILIES) <= set(arguments.complete_model(""))
    assert arguments.complete_pass("fuse_e") == ["fuse_experts"]
    assert arguments.complete_scheme("mx") == ["mxfp4"]
    assert arguments.complete_target("sm_90") == ["sm_90"]


def test_completion_reaches_the_shell() -> None:
    environment = os.environ | {
        "_MOECC_COMPLETE": "complete_bash", "COMP_WORDS": "moecc passes qwen3_m", "COMP_CWORD": "2",
    }  # fmt: skip
    code = "from moecc.cli import main; import sys; sys.argv = ['moecc']; main()"
    made = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert made.stdout.split() == ["qwen3_moe"], made.stderr


def test_json_has_fields_and_properties_of_nested_classes() -> None:
    found = inspection.Inspected(model="m", version="1", torch="2", notes=("a",), graphs=())
    assert plain({"x": (found,)}) == {
        "x": [{"model": "m", "version": "1", "torch": "2", "notes": ["a"], "graphs": []}]
    }


def test_a_benchmark_is_listed_and_run_with_its_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "layer" in [one.name for one in bench_cli.benchmarks()]
    folder = tmp_path / "benchmarks"
    monkeypatch.setattr(bench_cli, "FOLDER", folder)
    assert status(monkeypatch, "bench") == 2
    assert "benchmarks are run from a checkout" in capfd.readouterr().err
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "one.py").write_text(
        '"""Time nothing.\n\nAt all."""\n'
        "if __name__ == '__main__':\n    import sys; print(sys.argv[1:]); sys.exit(3)\n"
    )
    (folder / "shared.py").write_text('"""Hold what others share."""\n')
    assert status(monkeypatch, "bench") == 0
    assert capfd.readouterr().out == "Programs\n  one  Time nothing.\n"
    assert status(monkeypatch, "bench", "--json") == 0
    check(json.loads(capfd.readouterr().out), RESULTS["bench"])
    assert status(monkeypatch, "bench", "one", "--json", "file", "--help") == 3
    assert capfd.readouterr().out == "['--json', 'file', '--help']\n"
    assert status(monkeypatch, "bench", "shared") == 2
    assert "no benchmark 'shared'; there are ['one']" in capfd.readouterr().err


def test_a_suite_is_listed_before_programs_and_run_by_the_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "benchmarks"
    monkeypatch.setattr(bench_cli, "FOLDER", folder)
    (folder / "scenarios").mkdir(parents=True)
    (folder / "harness").mkdir()
    for package in (folder, folder / "harness"):
        (package / "__init__.py").touch()
    (folder / "harness" / "__main__.py").write_text("import sys; print(sys.argv[1:])\n")
    (folder / "scenarios" / "one.toml").write_text('about = "Time a lot."\n')
    (folder / "scenarios" / "contenders.toml").write_text('[moecc]\ncommand = ""\n')
    (folder / "one.py").write_text('"""Time nothing."""\nif __name__ == "__main__":\n    1 / 0\n')
    assert status(monkeypatch, "bench") == 0
    told = capfd.readouterr().out
    assert told == "Suites\n  one  Time a lot.\n  all  Run all suites.\n"
    assert status(monkeypatch, "bench", "one", "--quick", "--json", "file") == 0
    assert capfd.readouterr().out == "['one', '--quick', '--json', 'file']\n"

"""What compiling takes is told while it happens, where someone looks, and afterwards."""

import io
import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import moecc
from moecc import inspection, terminal
from moecc.records import all_records
from moecc.render import print_times
from moecc.runtime.errors import OptionError
from moecc.watching import Piece, Watch
from tests.passes.test_outline_layers import Layer, rows, stack


def compiled(**options: Any) -> nn.Module:
    model = stack(*(Layer() for _ in range(4)))
    asked: dict[str, Any] = {"inner": "eager", "outline": True, **options}
    call = torch.compile(model, backend="moecc", options=asked)
    with torch.no_grad():
        call(rows())
    return model


def test_nothing_is_printed_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    compiled()
    assert capfd.readouterr() == ("", "")


def test_says_what_is_compiled_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    compiled(progress=True)
    out, err = capfd.readouterr()
    first, second = err.splitlines()
    assert not out
    assert first.startswith("eager compiles between0, ")
    assert first.endswith(", 1 of 2")
    assert second.startswith("eager compiles layer0, ")
    assert second.endswith(", 2 of 2, about 0 s left")


class Terminal(io.StringIO):
    """Somebody looks."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("progress", "shown"), [("auto", True), (False, False)])
def test_a_terminal_has_a_line(progress: Any, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    compiled(progress=progress)
    assert ("eager compiles layer0" in screen.getvalue()) == shown


def test_a_terminal_has_one_line_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with terminal.live_line("outer") as outer:
        with terminal.live_line("inner") as inner:
            assert inner is outer
        with terminal.live_line("another") as another:
            assert another is outer
    with terminal.live_line("later") as later:
        assert later is not outer


def test_time_left_is_that_of_the_nodes_that_are_left() -> None:
    told: list[str] = []
    watch = Watch(inner="own", compiler=lambda gm, _: gm.forward, _tell=told.append)
    watch.pieces.append(Piece(name="first", nodes=10, seconds=5.0))
    gm = torch.fx.symbolic_trace(nn.ReLU())
    watch.compile(gm, (), "second", ahead=[20, 7])
    assert told == ["own compiles second, 3 nodes, 2 of 4, about 15 s left"]


def test_the_report_has_time_and_memory_of_each_piece() -> None:
    (graph,) = moecc.report(compiled()).graphs
    made = graph.compilation
    assert [(one["name"], one["seconds"] >= 0) for one in made["pieces"]] == [
        ("between0", True), ("layer0", True)
    ]  # fmt: skip
    assert made["tracing"] > 0
    assert 0.1 < made["resident"] <= made["peak"] < 50


def test_times_are_printed_pass_by_pass_and_piece_by_piece() -> None:
    out = io.StringIO()
    (graph,) = moecc.report(compiled()).graphs
    print_times(graph, Console(file=out, width=100))
    lines = [line.split("  ")[0] for line in out.getvalue().splitlines()]
    assert lines[1] == "Dynamo, to the graph"
    assert "pass outline_layers" in lines
    assert "eager, layer0: 11 nodes, called 4 times" in lines
    assert lines[-1].startswith("memory: ")


def test_the_report_names_what_auto_left_as_it_is() -> None:
    model = compiled()
    all_records()[-1].watch.pieces[0] = Piece(name="between0", nodes=5, seconds=0.0, eager=0.021)
    assert "  - between0 2.1%\n" in str(moecc.report(model))


def test_a_model_without_weights_cannot_be_timed_with_inductor() -> None:
    with pytest.raises(OptionError, match="needs --weights"):
        inspection.inspect("qwen3_moe", full=True, inner="inductor")

"""The page that `moecc report` writes, looked at as text and, where there is one, in a browser."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from moecc import cli, planning
from moecc.passes.text import graph_text, value_name
from moecc.report_html import caching, planned, roofline, routing
from moecc.report_html.grouping import Group, focus, group, groups_in
from moecc.report_html.layered import place
from moecc.report_html.listing import changed, parse
from moecc.report_html.routing import imbalance
from moecc.runtime.errors import OptionError
from moecc.runtime.offload import profile as profiles
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.recording import Pooled, Recording, write
from moecc.runtime.offload.trace import Request
from tests.models import GroupedMoe, capture, tokens

FACTORY = """
from tests.test_report_html import Deep
from tests.models import tokens

def deep():
    return Deep(5), (tokens(6),)
"""
VOID = {"meta", "link"}
"""Elements without an end."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.moe = nn.Linear(16, 16).bfloat16(), GroupedMoe()

    def forward(self, x: Any) -> Any:
        return x + self.moe(x + self.mix(x))


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Page(HTMLParser):
    """Collect what a page has, and check that every element ends where it should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.ids.update([known["id"]] if "id" in known else [])
        self.links += [str(known[name]) for name in ("href", "src") if name in known]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def recorded(blocks: int, experts: int = 4) -> Recording:
    """Make up a run of six passes, in which block b asks for experts b and b + 1, or b + 2."""
    names = [f"layers.{number}.moe" for number in range(blocks)]
    events = tuple(
        Request(
            block=block,
            tokens=1 if step else 8,
            experts=tuple(sorted({block % experts, (block + 1 + step % 2) % experts})),
            hits=0,
        )
        for step in range(6)
        for block in range(blocks)
    )
    return Recording(
        model="made up",
        policy="lru",
        blocks=tuple(Demand(name=one, experts=experts, active=2, size=10) for one in names),
        pool_of=tuple(range(blocks)),
        pools=(Pooled(slots=2, asked=12, hits=0, predicted=0),) * blocks,
        other_bytes=0,
        decode_rate=0.0,
        events=events,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Write the report of a model of five layers, and give its data."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "factory.py").write_text(FACTORY)
    write(recorded(5), folder / "t.jsonl")
    args = ["report", f"{folder}/factory.py:deep", "-o", f"{folder}/r.html", "--json"]
    args += ["--trace", f"{folder}/t.jsonl"]
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 0, result.output
    return folder / "r.html", json.loads(result.stdout)


def test_the_page_needs_nothing_and_everything_in_it_is_there(
    written: tuple[Path, dict[str, Any]],
) -> None:
    text = written[0].read_text()
    page = Page(text)
    assert not page.open
    assert max(page.ids.values()) == 1
    for link in page.links:
        assert link == "data:," or page.ids[link.removeprefix("#")] == 1
    assert "url(http" not in text
    assert "@import" not in text
    start = text.index('id="data">') + len('id="data">')
    data = json.loads(text[start : text.index("</script>", start)])
    sides = [one[side] for one in data["walk"] for side in ("before", "after")]
    shown = {f"picture-{view}" for side in sides for _, view in side["views"]}
    assert shown == {name for name in page.ids if name.startswith("picture-")}
    for side in sides:
        assert [] in [where for where, _ in side["views"]]
        assert side["focus"] in [where for where, _ in side["views"]]


def test_the_data_is_what_the_passes_did(written: tuple[Path, dict[str, Any]]) -> None:
    data = written[1]
    assert [one["name"] for one in data["changes"]][:2] == ["fuse_experts", "lower"]
    assert len(data["graphs"][0]["blocks"]) == data["rooflines"][0]["blocks"] == 5
    assert "+%experts = moecc.experts(" in data["changes"][0]["diff"]
    assert len(data["routing"]["loads"]) == 5
    assert len(data["cache"]["passes"]) == 6
    assert data["plan"] is None
    assert "--memory 25%" in written[0].read_text()


def test_a_browser_shows_it_without_an_error(written: tuple[Path, dict[str, Any]]) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("there is no chromium to open the page in")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    profile = f"--user-data-dir={written[0].parent / 'profile'}"
    command = [browser, *flags, profile, "--dump-dom", written[0].as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in ran.stderr
    assert ran.stdout.count('class="stage"><svg class="graph"') == 2


def test_a_printed_graph_is_read_back_as_it_is() -> None:
    graph = capture(Deep(2), tokens(6)).gm.graph
    lines = parse(graph_text(graph))
    for line, node in zip(lines, graph.nodes, strict=True):
        assert set(line.inputs) == {value_name(one) for one in node.all_input_nodes}
        if node.op != "output":
            assert line.name == value_name(node)
            assert line.is_input == (node.op == "placeholder")


def test_layers_that_compute_alike_are_one_box_and_no_node_is_lost() -> None:
    lines = parse(graph_text(capture(Deep(5), tokens(6)).gm.graph))
    computed = {line.name for line in lines if not line.is_input}
    root = group(lines, frozenset())
    layers, end = root.members
    assert isinstance(layers, Group)
    assert (layers.repeats, layers.title) == (5, "layers.0 … layers.4")
    assert {line.name for line in (*layers.lines, *end.lines)} == computed
    for one in groups_in(root).values():
        keys = [member.key for member in one.members if isinstance(member, Group)]
        assert len(keys) == len(set(keys))


def test_a_changed_layer_is_shown_beside_those_that_are_alike() -> None:
    lines = parse(graph_text(capture(Deep(4), tokens(6)).gm.graph))
    (one,) = [line for line in lines if line.path == "layers.2.moe" and line.target == "sort"]
    others = tuple(line for line in lines if line is not one)
    assert changed(lines, others) == {one.name}
    root = group(lines, frozenset({one.name}))
    assert focus(root) == ("layers.2", "moe")
    first, third, fourth = [member for member in root.members if isinstance(member, Group)]
    assert (first.repeats, third.repeats, fourth.repeats) == (2, 1, 1)


def test_a_flat_graph_of_thousands_of_nodes_is_cut_into_parts() -> None:
    text = "\n".join(f"%n{at} = add(%n{max(0, at - at % 7 - 1)}, {at})" for at in range(3000))
    found = groups_in(group(parse(text), frozenset()))
    assert all(len(one.members) <= 60 for one in found.values())
    assert len(found) > 40


OUTLINED = """\
%x = placeholder  # f32[5, 16]
@layers.0.weight = placeholder  # f32[16, 16]
@layers.1.weight = placeholder  # f32[16, 16]
%layer0 = layer0(%x, @layers.0.weight)  # layers.0
%y = getitem(%layer0, 0)  # f32[5, 16]  layers.0
%layer0_1 = layer0(%y, @layers.1.weight)  # layers.1
%z = getitem(%layer0_1, 0)  # f32[5, 16]  layers.1
return (%z)

layer0:
%x = placeholder  # f32[5, 16]
@layers.0.weight = placeholder  # f32[16, 16]
%y = linear(%x, @layers.0.weight)  # f32[5, 16]  layers.0
%sin = sin(%y)  # f32[5, 16]  layers.0
return (%sin)
"""


def test_a_graph_that_others_call_opens_where_it_is_called() -> None:
    lines = parse(OUTLINED)
    assert len(lines) == 8
    call = next(line for line in lines if line.name == "%layer0")
    assert [line.name for line in call.body][2:] == ["layer0:%y", "layer0:%sin", "layer0:return"]
    assert call.body[2].inputs == ("layer0:%x", "@layers.0.weight")
    layers, _ = group(lines, frozenset()).members
    assert isinstance(layers, Group)
    assert (layers.repeats, layers.nodes) == (2, 12)
    inner = groups_in(layers)[("layer0",)]
    assert [line.printed for one in inner.members for line in one.lines] == ["%y", "%sin", "return"]
    assert changed(lines, parse(OUTLINED.replace("sin(", "cos("))) == {"layer0:%sin"}


@st.composite
def drawn(draw: st.DrawFn) -> tuple[list[tuple[float, float]], list[tuple[int, int]]]:
    count = draw(st.integers(1, 14))
    widths = draw(st.lists(st.integers(20, 200), min_size=count, max_size=count))
    pairs = [(start, end) for end in range(count) for start in range(end)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return [(float(width), 30.0) for width in widths], edges


@settings(max_examples=60, deadline=None)
@given(drawn())
def test_boxes_never_overlap_and_edges_go_down(
    graph: tuple[list[tuple[float, float]], list[tuple[int, int]]],
) -> None:
    sizes, edges = graph
    made = place(sizes, edges)
    for (x, y), (width, height) in zip(made.centers, sizes, strict=True):
        assert width / 2 - 1e-6 <= x <= made.width - width / 2 + 1e-6
        assert height / 2 <= y <= made.height - height / 2
    for one, (x, y) in enumerate(made.centers):
        for other in range(one):
            right, low = made.centers[other]
            if abs(y - low) < 30:
                assert abs(x - right) >= (sizes[one][0] + sizes[other][0]) / 2
    for route, (start, end) in zip(made.routes, edges, strict=True):
        assert route[0] == (made.centers[start][0], made.centers[start][1] + 15)
        assert route[-1] == (made.centers[end][0], made.centers[end][1] - 15)
        assert all(high[1] <= low[1] for high, low in pairwise(route))


def test_imbalance_is_measured_between_even_and_always_the_same() -> None:
    even, one = imbalance([3, 3, 3, 3]), imbalance([0, 8, 0, 0])
    assert (even.peak, even.variation, even.unused) == (1, 0, 0)
    assert even.entropy == pytest.approx(1)
    assert (one.peak, one.entropy, one.unused) == (4, 0, 0.75)
    assert one.variation == pytest.approx(3**0.5)
    assert imbalance([4, 2]).entropy == pytest.approx(0.9183, abs=1e-4)


def test_few_tokens_are_held_back_by_reading_and_many_by_products() -> None:
    shape = (128, 8, 2048, 768, True)
    roof = roofline.roof_of(shape, profiles.read("rtx4090"))
    first, last = roof.points[0], roof.points[-1]
    assert first.intensity == pytest.approx(1)  # 2 FLOPs and 2 bytes a weight
    assert 0.4 < first.rate / roof.bandwidth < 1
    assert 0.9 < last.rate / roof.peak < 1
    assert last.intensity == pytest.approx(16384 * 8 / 128, rel=0.01)


def test_loads_count_decoded_tokens_and_the_cache_every_pass() -> None:
    run = recorded(2)
    counted = routing.gather(run)
    assert counted.single
    assert counted.loads == ((5, 2, 3, 0), (0, 5, 2, 3))  # without the prefill
    played = caching.gather(run)
    assert [one.asked for one in played.passes] == [4] * 6
    assert [one.hits for one in played.passes] == [0, 2, 2, 2, 2, 2]  # two slots: one stays
    assert [one.demand_bytes for one in played.passes] == [40, 20, 20, 20, 20, 20]
    assert played.passes[0].tokens == 8


def test_a_plan_is_drawn_between_its_bounds() -> None:
    machines = [profiles.read("rtx4090")]
    made = planned.gather(planning.run("qwen3_moe", 0.25, machines), machines)
    (curve,), rate = made.curves, made.plan.rates[0]
    assert curve.hidden[-1] == pytest.approx(rate.best.hidden)
    assert curve.on_demand[-1] == pytest.approx(rate.best.on_demand)
    assert list(curve.on_demand) == sorted(curve.on_demand)
    assert 'class="band"' in planned.section(made).html


def test_a_trace_of_another_model_is_refused(written: tuple[Path, dict[str, Any]]) -> None:
    folder = written[0].parent
    write(recorded(5, experts=8), folder / "other.jsonl")
    args = ["report", f"{folder}/factory.py:deep", "--json", "--trace", f"{folder}/other.jsonl"]
    error = CliRunner().invoke(cli.app, args).exception
    assert isinstance(error, OptionError)
    assert "'made up'" in str(error)


def test_the_command_line_reads_no_page_until_it_writes_one() -> None:
    loaded = "import sys, moecc.cli; print(sorted(n for n in sys.modules if 'report_html' in n))"
    ran = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"

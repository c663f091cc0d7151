from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import moecc
from moecc.inner import why_whole
from moecc.passes.ir import Callee, Program
from moecc.passes.options import Options
from moecc.passes.outline_layers import outline_layers
from moecc.passes.pipeline import Result, run
from moecc.passes.text import graph_diff
from moecc.pieces import compile_pieces
from moecc.watching import Watch
from tests.models import HIDDEN, capture, relative_error

ON = Options(outline=True)


class Layer(nn.Module):
    """A residual block."""

    def __init__(
        self, activation: Callable[[torch.Tensor], torch.Tensor] = functional.silu
    ) -> None:
        super().__init__()
        self.gate, self.down = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = functional.layer_norm(x, (HIDDEN,))
        return x + self.down(self.activation(self.gate(normed)))


def stack(*layers: nn.Module) -> nn.Module:
    """Put layers behind each other, the stream that they read being computed."""
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), *layers).eval()


def rows(count: int = 5) -> torch.Tensor:
    return torch.randn(count, HIDDEN)


def outlined(gm: Any, options: Options = ON, **program: Any) -> Result:
    return run(Program(gm=gm, **program), options, (outline_layers,), keep_text=True)


def callees(model: nn.Module, options: Options = ON) -> tuple[Callee, ...]:
    return outlined(capture(model, rows()).gm, options).program.callees


def test_calls_one_callee_for_layers_that_are_alike(golden: Callable[[str], None]) -> None:
    result = outlined(capture(stack(Layer(), Layer(), Layer()), rows()).gm)
    step = result.steps[0]
    golden(graph_diff(step.before, step.after, "outline_layers") + "\n")
    (callee,) = result.program.callees
    assert callee.paths == ("1", "2", "3")


def test_keeps_the_numbers_of_each_layers_weights() -> None:
    model, x = stack(*(Layer() for _ in range(4))), rows()
    captured = capture(model, x)
    assert outlined(captured.gm).steps[0].rewrites == 4
    with torch.no_grad():
        assert torch.equal(captured.run(), model(x))


def test_running_twice_is_running_once() -> None:
    once = outlined(capture(stack(Layer(), Layer(), Layer()), rows()).gm)
    twice = run(once.program, ON, (outline_layers,), keep_text=True)
    assert twice.steps[0].after == once.steps[0].after
    assert twice.program == once.program


def test_near_repeats_are_callees_of_their_own() -> None:
    silu, gelu = functional.silu, functional.gelu
    found = callees(stack(*map(Layer, (silu, silu, gelu, gelu, silu))))
    assert [one.paths for one in found] == [("1", "2", "5"), ("3", "4")]


def test_small_layers_that_alternate_are_one_callee() -> None:
    found = callees(stack(*map(Layer, (functional.silu, functional.gelu) * 3)))
    assert [(len(one.paths), one.nodes) for one in found] == [(3, 10)]


class Scaled(Layer):
    """The same nodes with another constant."""

    def __init__(self, factor: float) -> None:
        super().__init__(lambda x: functional.silu(x) * factor)


def test_layers_with_other_constants_are_not_alike() -> None:
    assert not callees(stack(*map(Scaled, (1.0, 2.0, 3.0))))


class Wide(Layer):
    """Another size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.down = nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN)


def test_layers_of_other_sizes_are_not_alike() -> None:
    assert not callees(stack(*map(Wide, (8, 16, 24))))


class Caching(Layer):
    """Writes what it sees into a buffer, as attention does into a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(8, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache[: x.shape[0]] = x
        return super().forward(x) + self.cache.sum(0)


def test_writes_in_place_reach_each_layers_own_buffer() -> None:
    model, other = stack(*(Caching() for _ in range(4))), stack(*(Caching() for _ in range(4)))
    other.load_state_dict(model.state_dict())
    compiled = torch.compile(
        model, backend="moecc", options={"inner": "aot_eager", "outline": True}
    )
    with torch.no_grad():
        for count in (5, 3):
            x = rows(count)
            assert relative_error(compiled(x), other(x)) < 1e-6
            for one, two in zip(model[1:], other[1:], strict=True):
                torch.testing.assert_close(one.cache, two.cache)


class Viewing(nn.Module):
    """Takes two views of one tensor and writes through one of them."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            normed = functional.layer_norm(x, (HIDDEN,)) * y.relu().neg()
            x.add_(1)
            x = x + normed.relu().neg()
        return x


def test_a_layer_that_writes_to_memory_that_it_reads_elsewhere_is_left_alone() -> None:
    whole = torch.randn(2, 5, HIDDEN)
    compiled = torch.compile(
        Viewing(), backend="moecc", options={"inner": "aot_eager", "outline": True}
    )
    with torch.no_grad():
        want = Viewing()(*(part := whole.clone()[0], part))
        got = compiled(*(part := whole.clone()[0], part[:]))
    torch.testing.assert_close(got, want)


class Tail(nn.Module):
    """Writes to a tensor whose view was taken before the layers, and reads the view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = stack(*(Layer() for _ in range(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x + 1
        seen = hidden.view(-1)
        out = self.layers(hidden)
        hidden.mul_(3)
        return out + seen.view_as(out)


def test_what_follows_the_layers_may_write_to_what_a_view_shows() -> None:
    model, x = Tail(), rows()
    compiled = torch.compile(
        model, backend="moecc", options={"inner": "aot_eager", "outline": True}
    )
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-6
    (graph,) = moecc.report(model).graphs
    assert "shares with layers" in graph.passes[-1]["note"]


class Scoped(nn.Module):
    """Layers inside of one autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = stack(*(Layer() for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x)


def test_nothing_is_cut_inside_a_scope() -> None:
    assert not callees(Scoped())


@pytest.mark.parametrize(
    ("options", "program", "why"),
    [
        (Options(outline=False), {}, "off: the graph is compiled whole"),
        (ON, {"trains": True}, "off: gradients are wanted"),
        (Options(), {"whole": "CUDA graphs"}, "off: CUDA graphs"),
        (Options(), {}, "too few layers repeat in 21 nodes"),
    ],
)
def test_says_why_a_graph_stays_whole(options: Options, program: Any, why: str) -> None:
    model = stack(*(Layer() for _ in range(4)))
    result = outlined(capture(model, rows()).gm, options, **program)
    assert (result.steps[0].note, result.steps[0].rewrites) == (why, 0)


def test_each_piece_is_compiled_once_with_the_symbols_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, list[Any]]] = []

    def compiler(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        seen.append((len(gm.graph.nodes), [one.shape for one in inputs if hasattr(one, "shape")]))
        return gm.forward

    def inner(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        run(Program(gm=gm), ON, (outline_layers,))
        return compile_pieces(gm, Watch(inner="own", compiler=compiler))

    model = stack(*(Layer() for _ in range(4)), nn.Linear(HIDDEN, 4))
    compiled = torch.compile(model, backend=inner, dynamic=True)
    with torch.no_grad():
        for count in (5, 7, 9):
            torch.testing.assert_close(compiled(x := rows(count)), model(x))
    assert len(seen) == 3, "what is before, a layer, what is behind; not again for other rows"
    assert all(isinstance(shapes[0][0], torch.SymInt) for _, shapes in seen)


class Reading(nn.Module):
    """Layers that read caches, each of a length of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = stack(*(Layer() for _ in range(3)))

    def forward(self, x: torch.Tensor, *caches: torch.Tensor) -> torch.Tensor:
        for layer, cache in zip(self.layers, (x, *caches), strict=True):
            x = layer(x) + cache.sum(0)
        return x


@pytest.mark.parametrize(("lengths", "compiled"), [((10, 12, 11), 1), ((10, 12, 5), 2)])
def test_a_layer_for_which_a_guard_does_not_hold_is_compiled_for_itself(
    lengths: tuple[int, ...], compiled: int
) -> None:
    graphs: list[Watch] = []

    def compiler(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        long = [bool(one > 8) for one in inputs if isinstance(one, torch.SymInt)]
        return lambda *args: (assert_(long, args), gm.forward(*args))[1]

    def assert_(long: list[bool], args: Sequence[Any]) -> None:
        assert long == [one > 8 for one in args if isinstance(one, int)], "what it is compiled for"

    def inner(gm: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
        run(Program(gm=gm), ON, (outline_layers,))
        graphs.append(Watch(inner="own", compiler=compiler))
        return compile_pieces(gm, graphs[-1])

    model = Reading()
    call = torch.compile(model, backend=inner, dynamic=True)
    with torch.no_grad():
        for caches in (lengths, (10, 12, 11), (10, 12, 5)):
            inputs = rows(9), *map(rows, caches)
            torch.testing.assert_close(call(*inputs), model(*inputs))
    first, *_ = graphs
    assert [one.name for one in first.pieces].count("layer0") == compiled
    assert len(graphs) == 2, "guards of all layers are guards of the graph"


class Settings(nn.Module):
    """Layers that scale by numbers of their own, and by one that is given."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(HIDDEN, HIDDEN), nn.ModuleList(map(Held, scales))

    def forward(self, x: torch.Tensor, by: float | None = None) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x) if by is None else layer(x) * by
        return x


class Held(Layer):
    """Scales by a number that it holds."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def test_numbers_of_modules_are_constants_where_all_is_dynamic() -> None:
    model = Settings(0.5, 0.5, 0.5, 0.25, 0.25)
    asked = {"inner": "aot_eager", "outline": True}
    call = torch.compile(model, backend="moecc", dynamic=True, fullgraph=True, options=asked)
    with torch.no_grad():
        for scale in (0.5, 2.0):
            model.layers[0].scale = scale
            torch.testing.assert_close(call(x := rows()), model(x))
    first, second = moecc.report(model).graphs
    assert [len(one["paths"]) for one in first.callees] == [3, 2], "another number, another layer"
    assert second.callees


def test_a_number_that_changes_from_call_to_call_keeps_the_graph_whole() -> None:
    model = Settings(0.5, 0.5, 0.5)
    asked = {"inner": "aot_eager", "outline": True}
    call = torch.compile(model, backend="moecc", fullgraph=True, options=asked)
    with torch.no_grad():
        for by in (0.3, 0.7, 0.9):
            torch.testing.assert_close(call(x := rows(), by), model(x, by))
    first, second = moecc.report(model).graphs
    assert first.callees
    assert second.passes[-1]["note"] == "off: a number that it reads may change from call to call"


def test_auto_leaves_what_is_little_beside_the_layers_as_it_is() -> None:
    compiled: list[int] = []

    def compiler(gm: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
        compiled.append(len(gm.graph.nodes))
        return gm.forward

    watch = Watch(inner="own", compiler=compiler, auto=True)

    def inner(gm: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
        run(Program(gm=gm), ON, (outline_layers,))
        return compile_pieces(gm, watch)

    model = stack(*(Layer() for _ in range(30)), nn.Linear(HIDDEN, 4), nn.ReLU())
    with torch.no_grad():
        got = torch.compile(model, backend=inner, dynamic=True)(x := rows())
        torch.testing.assert_close(got, model(x))
    assert [(one.name, one.eager and round(one.eager, 3)) for one in watch.pieces] == [
        ("between0", 0.02), ("layer0", None), ("between1", None)
    ], "1, 30 times 5 and 2 operations: with the last two it would be more than 3 %"  # fmt: skip
    assert len(compiled) == 2


def test_modes_that_record_cuda_graphs_keep_the_graph_whole() -> None:
    assert why_whole("inductor", "reduce-overhead", on_gpu=True)
    assert not why_whole("inductor", "reduce-overhead", on_gpu=False)
    assert not why_whole("inductor", None, on_gpu=True)
    assert "may need tensors with values" in why_whole("tvm", None, on_gpu=False)

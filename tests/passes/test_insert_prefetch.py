from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from moecc.passes.insert_prefetch import insert_prefetch
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import PIPELINE, Result, run
from moecc.passes.text import graph_diff
from tests.models import HIDDEN, BatchedMoe, capture, tokens


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
        self.moe = BatchedMoe(torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x)
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    def __init__(self, layers: int = 3, kind: type[nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def with_lent_experts(model: nn.Module, **options: Any) -> tuple[Result, Any]:
    """Run the pipeline as if the experts of every block were on disk."""
    captured = capture(model, tokens(5, torch.float32))
    found = run(Program(gm=captured.gm), Options(), PIPELINE[:2]).program
    lent = replace(found, lent=frozenset(block.gate_up for block in found.blocks))
    chosen = Options(kernels="torch", inner="eager", **options)
    return run(lent, chosen, PIPELINE[2:], keep_text=True), captured


def step(result: Result) -> Any:
    return next(one for one in result.steps if one.name == "insert_prefetch")


def guesses(result: Result) -> list[tuple[str, str, int]]:
    return [(one.at[-12:], one.block[-12:], one.distance) for one in result.program.prefetches]


def test_clones_the_next_router_onto_the_stream(golden: Callable[[str], None]) -> None:
    result, _ = with_lent_experts(Model(2))
    golden(graph_diff(step(result).before, step(result).after, "insert_prefetch") + "\n")


def test_every_block_but_the_first_is_predicted_by_the_one_before() -> None:
    result, _ = with_lent_experts(Model(3))
    assert [distance for _, _, distance in guesses(result)] == [1, 1]
    assert not step(result).misses


@pytest.mark.parametrize(("lookahead", "count"), [(0, 0), (1, 3), (2, 5), (3, 6), (9, 6)])
def test_lookahead_says_how_many_blocks_ahead(lookahead: int, count: int) -> None:
    result, _ = with_lent_experts(Model(4), lookahead=lookahead)
    assert len(result.program.prefetches) == count


class Embedded(nn.Module):
    """Positions have a table, too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, HIDDEN), nn.Embedding(8, HIDDEN)
        self.rest = Model(2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rest(self.words(ids) + self.places(torch.arange(ids.shape[-1])))


def test_the_first_block_is_predicted_by_its_tokens_before_they_are_embedded() -> None:
    captured = capture(Embedded(), torch.tensor([4, 9, 4]))
    found = run(Program(gm=captured.gm), Options(), PIPELINE[:2]).program
    lent = replace(found, lent=frozenset(block.gate_up for block in found.blocks))
    result = run(lent, Options(kernels="torch"), PIPELINE[2:])
    first, second = result.program.prefetches[::-1]
    assert (first.at, first.block, second.distance) == ("tokens", result.program.blocks[0].path, 1)
    nodes = list(captured.gm.graph.nodes)
    recall = next(one for one in nodes if one.target is torch.ops.moecc.recall.default)
    tokens_of, gate_up, active = recall.args
    table = next(one for one in nodes if one.args[:1] == (tokens_of,) and one is not recall)
    assert table.args[1].meta["example_value"].shape == (50, HIDDEN)
    assert nodes.index(recall) < nodes.index(table)
    experts = next(one for one in nodes if recall in one.all_input_nodes)
    assert (experts.args[3], active) == (gate_up, result.program.blocks[0].active)


def test_keeps_the_numbers_bit_for_bit() -> None:
    model = Model(3)
    without, plain = with_lent_experts(model, lookahead=0)
    torch._dynamo.reset()
    guessed, captured = with_lent_experts(model, lookahead=2)
    assert step(guessed).rewrites > step(without).rewrites == 0
    captured.inputs[:] = plain.inputs
    assert torch.equal(captured.run(), plain.run())


def test_what_is_predicted_are_the_scores_of_the_next_router_on_the_earlier_stream() -> None:
    model = Model(2)
    x = tokens(5, torch.float32)
    seen: list[torch.Tensor] = []
    captured = capture(model, x)
    found = run(Program(gm=captured.gm), Options(), PIPELINE[:2]).program
    lent = replace(found, lent=frozenset(block.gate_up for block in found.blocks))
    run(lent, Options(kernels="torch"), PIPELINE[2:])
    for node in captured.gm.graph.find_nodes(
        op="call_function", target=torch.ops.moecc.prefetch.default
    ):
        node.target = lambda scores, *rest: (seen.append(scores), scores.new_empty(0))[1]
    captured.gm.recompile()
    with torch.no_grad():
        captured.run()
        first, second = model.layers
        stream = captured.inputs[0] if captured.inputs[0].shape == x.shape else x
        stream = next(one for one in captured.inputs if one.shape == x.shape)
        stream = stream + first.mix(stream)
        wanted = second.moe.pick.proj(second.norm(stream)).softmax(-1)
    torch.testing.assert_close(seen[0], wanted)


def test_running_twice_is_running_once() -> None:
    once, _ = with_lent_experts(Model(3))
    twice = run(once.program, Options(kernels="torch"), (insert_prefetch,), keep_text=True)
    assert twice.steps[0].rewrites == 0
    assert "already" in twice.steps[0].note


def test_resident_experts_are_not_predicted() -> None:
    captured = capture(Model(2), tokens(5, torch.float32))
    result = run(Program(gm=captured.gm), Options(kernels="torch"))
    assert not result.program.prefetches
    assert step(result).note == "nothing to fetch: every expert is resident"


class WithoutResidual(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(self.norm(x + self.mix(x)))


class RoutedByPosition(Layer):
    """The router also reads what was made outside of the residual stream."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.mix(x)
        return y + self.moe(self.norm(y) * x.sin())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (WithoutResidual, "its output is not added to what its router reads"),
        (RoutedByPosition, "its router reads more than the residual stream"),
    ],
)
def test_a_router_that_cannot_be_moved_is_a_miss(kind: type[nn.Module], why: str) -> None:
    result, _ = with_lent_experts(Model(2, kind))
    assert not result.program.prefetches
    assert [miss.why for miss in step(result).misses] == [f"no prefetch: {why}"]


class ChangesTheStream(Layer):
    """Writes to the stream in place after its router read it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x)
        return x.add_(self.moe(self.norm(x)))


def test_in_place_residuals_are_followed_or_left_alone() -> None:
    model = Model(2, ChangesTheStream)
    result, captured = with_lent_experts(model)
    x = next(one for one in captured.inputs if one.shape == (5, HIDDEN))
    with torch.no_grad():
        torch.testing.assert_close(captured.run(), model(x))
    assert len(result.program.prefetches) + len(step(result).misses) == 1

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from moecc.codegen.activation import OPERATIONS, evaluate, render
from moecc.codegen.reference import split_gate_up
from moecc.codegen.spec import KernelSpec
from moecc.passes.activation import UnreadableActivation, read_activation
from tests.models import BatchedMoe
from tests.passes.rewriting import rewritten, tokens

WIDTH = 8


def halves(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rows.chunk(2, dim=-1)


ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str, str]] = {
    "swiglu": (lambda r: F.silu(halves(r)[0]) * halves(r)[1], "mul(silu(gate), up)", "halves"),
    "geglu": (
        lambda r: halves(r)[1] * F.gelu(halves(r)[0], approximate="tanh"),
        "mul(up, gelu_tanh(gate))",
        "halves",
    ),
    "split": (
        lambda r: r.split(WIDTH // 2, -1)[0] * r.split(WIDTH // 2, -1)[1],
        "mul(gate, up)",
        "halves",
    ),
    "slices": (
        lambda r: r[..., : WIDTH // 2].sigmoid() * r[..., WIDTH // 2 :],
        "mul(sigmoid(gate), up)",
        "halves",
    ),
    "relu2": (lambda r: F.relu(r) ** 2, "square(relu(x))", "plain"),
    "clamped": (
        lambda r: (r[..., 1::2].clamp(-7, 7) + 1) * r[..., ::2].clamp(max=7.0).sigmoid(),
        "mul(add(min(max(up, -7.0), 7.0), 1.0), sigmoid(min(gate, 7.0)))",
        "interleaved",
    ),
    "cast": (
        lambda r: (F.silu(halves(r)[0].float()) * halves(r)[1].float()).to(torch.float32),
        "mul(silu(gate), up)",
        "halves",
    ),
    "reversed": (lambda r: (1 - r.tanh()) / 2, "div(sub(1.0, tanh(x)), 2.0)", "plain"),
}  # fmt: skip


class Between(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.act(rows)


def values_of(module: nn.Module, graph: Graph, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a graph and note what each node gives, as Dynamo does."""
    values: dict[str, torch.Tensor] = {}

    class Shapes(Interpreter):
        def run_node(self, n: Node) -> torch.Tensor:
            n.meta["example_value"] = values[n.name] = super().run_node(n)
            return values[n.name]

    Shapes(GraphModule(module, graph)).run(rows)
    return values


def traced_module(module: nn.Module, width: int = WIDTH) -> Node:
    graph: Graph = torch.fx.Tracer().trace(module)
    values_of(module, graph, torch.zeros(1, width))
    return graph.output_node().args[0]


def traced(act: Callable[[torch.Tensor], torch.Tensor], width: int = WIDTH) -> Node:
    return traced_module(Between(act), width)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_reads_what_models_write(name: str) -> None:
    act, text, layout = ACTIVATIONS[name]
    read = read_activation(traced(act))
    assert str(read.expr) == text
    assert (read.gated, read.interleaved) == (layout != "plain", layout == "interleaved")
    spec = KernelSpec(
        hidden=4, intermediate=4, experts=1, dtype=torch.float32, activation=read.expr,
        gated=read.gated, interleaved=read.interleaved, transposed=False,
        down_transposed=False, bias=False, device="cpu",
    )  # fmt: skip
    rows = 9 * torch.randn(5, WIDTH)
    torch.testing.assert_close(evaluate(read.expr, **split_gate_up(rows, spec)), act(rows))


@pytest.mark.parametrize(
    "act",
    [
        lambda r: r.softmax(-1) * halves(r)[0].repeat(1, 2),
        lambda r: halves(r)[0] * r[..., ::2],
        lambda r: r[..., 1:5] * r[..., 4:],
        lambda r: torch.add(halves(r)[0], halves(r)[1], alpha=2),
        lambda r: r.split([2, 6], dim=-1)[0] * r.split([6, 2], dim=-1)[1],
    ],
)
def test_refuses_what_is_not_elementwise_in_two_halves(
    act: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    node = traced(act)
    try:
        read = read_activation(node)
    except UnreadableActivation:
        return
    assert read.rows.op != "placeholder", "read something else than what the model computes"


@given(st.sampled_from(sorted(OPERATIONS)), st.floats(-30, 30), st.floats(-30, 30))
def test_rendered_text_names_every_operation(name: str, one: float, two: float) -> None:
    from moecc.codegen.activation import apply, constant

    args = [constant(value) for value in (one, two)[: OPERATIONS[name]]]
    table = {op: f"{op}({', '.join(f'{{{i}}}' for i in range(n))})" for op, n in OPERATIONS.items()}
    expr = apply(name, *args)
    assert render(expr, table | {"constant": "{0}"}) == str(expr)


class TwoProducts(nn.Module):
    def __init__(self, act: Callable[..., torch.Tensor], bias: bool = False) -> None:
        super().__init__()
        self.act, self.bias = act, bias
        self.w1, self.w3 = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.b1, self.b3 = (nn.Parameter(torch.randn(WIDTH)) for _ in range(2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(rows, self.w1), F.linear(rows, self.w3)
        return self.act(gate + self.b1, self.b3 + up) if self.bias else self.act(gate, up)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("act", "text", "gate"),
    [
        (lambda a, b: F.silu(a) * b, "mul(silu(gate), up)", 0),
        (lambda a, b: a.clamp(-1, 1) * F.silu(b), "mul(min(max(up, -1.0), 1.0), silu(gate))", 1),
        (lambda a, b: a * b, "mul(gate, up)", 0),
        (lambda a, b: (b + 1) * torch.tanh(a), "mul(add(up, 1.0), tanh(gate))", 0),
    ],
)
def test_two_products_are_gate_and_up(
    act: Callable[..., torch.Tensor], text: str, gate: int, bias: bool
) -> None:
    module = TwoProducts(act, bias)
    node = traced_module(module)
    read = read_activation(node)
    assert str(read.expr) == text
    assert read.up_rows is not None
    assert (read.gated, read.interleaved) == (True, False)
    rows = 3 * torch.randn(5, WIDTH)
    values = values_of(module, node.graph, rows)
    leaves = {"gate": values[read.rows.name], "up": values[read.up_rows.name]}
    torch.testing.assert_close(evaluate(read.expr, **leaves), module(rows))
    weight = (module.w1, module.w3)[gate]
    expected = F.linear(rows, weight, (module.b1, module.b3)[gate] if bias else None)
    torch.testing.assert_close(leaves["gate"], expected)


@pytest.mark.parametrize(
    "act",
    [
        lambda a, b: F.silu(a) * b * a.flip(0),
        lambda a, b: F.silu(a) * b + a.cumsum(0),
        lambda a, b: F.silu(a.chunk(2, -1)[0]) * b[..., :4] * a.chunk(2, -1)[1],
    ],
)
def test_refuses_what_is_neither_two_products_nor_two_halves(
    act: Callable[..., torch.Tensor],
) -> None:
    with pytest.raises(UnreadableActivation):
        read_activation(traced_module(TwoProducts(act)))


def test_a_float_of_the_model_is_a_constant_and_another_one_compiles_anew() -> None:
    """Dynamo makes floats symbols where everything is dynamic."""

    class Clamped(BatchedMoe):
        limit, share = 0.5, 1.702

        def activate(self, rows: torch.Tensor) -> torch.Tensor:
            gate, up = rows.chunk(2, dim=-1)
            gate = gate.clamp(max=self.limit)
            return gate * torch.sigmoid(gate * self.share) * up

    model = Clamped(torch.float32)
    done = rewritten(model, dynamic=True)
    for tokens_ in (6, 9, 17):
        assert done.error(tokens(tokens_)) < 1e-5
    assert done.blocks == [1]
    assert "1.702" in str(done.results[0].program.blocks[0].activation)
    model.share = 1.0
    assert done.error(tokens(7)) < 1e-5
    assert done.blocks == [1, 1]

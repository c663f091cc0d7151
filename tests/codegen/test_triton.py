"""The Triton emitter's numbers, in the interpreter and on a GPU if there is one."""

import dataclasses
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch

from moecc.codegen.activation import GATE, OPERATIONS, UP, X, apply, evaluate
from moecc.codegen.spec import KernelSpec
from moecc.codegen.triton_tiles import block_ms
from moecc.runtime.errors import InputError, UnsupportedSpec
from moecc.runtime.schemes.scheme import SCHEMES, Schemes

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")

import triton.language as tl  # noqa: E402

from moecc.codegen import triton_emitter, triton_launches  # noqa: E402
from moecc.codegen.triton_inputs import Inputs  # noqa: E402
from moecc.codegen.triton_launches import plan_launches  # noqa: E402
from tests.codegen.triton_cases import (  # noqa: E402
    STYLES,
    TOLERANCE,
    assert_close,
    decode,
    expect,
    grouped,
    make_inputs,
    make_spec,
    tensors,
)
from tests.codegen.triton_interpreter import interpreted  # noqa: E402


def run(spec: KernelSpec, x: Inputs) -> torch.Tensor:
    """Run as a user does; the algorithm is chosen from T and K."""
    with interpreted():
        return triton_emitter.emit(spec).run(*tensors(x))


def run_both(spec: KernelSpec, x: Inputs, block_m: int = 16) -> list[torch.Tensor]:
    """Run either algorithm on the same tensors."""
    launches = plan_launches(spec)
    with interpreted():
        return [
            decode(launches, x),
            grouped(launches, x, block_m),
        ]


# Numbers


@pytest.mark.parametrize(("number", "style"), [*enumerate(STYLES)])
def test_both_algorithms_agree_with_the_definition(number: int, style: str) -> None:
    """In one dtype each: what depends on it is layouts, which `test_triton_layouts` pairs."""
    dtype = list(TOLERANCE)[number % len(TOLERANCE)]
    spec = dataclasses.replace(STYLES[style], dtype=dtype)
    x = make_inputs(spec, tokens=3, active=2)
    for out in run_both(spec, x):
        assert_close(out, expect(spec, x), dtype)


@pytest.mark.parametrize(
    ("tokens", "active", "experts", "hidden", "intermediate"),
    [
        (1, 1, 1, 48, 40),
        (1, 8, 8, 64, 24),
        (7, 3, 5, 96, 72),
        (17, 2, 8, 80, 33),
        (33, 4, 4, 50, 130),
    ],
)
def test_any_shape(tokens: int, active: int, experts: int, hidden: int, intermediate: int) -> None:
    spec = make_spec(experts=experts, hidden=hidden, intermediate=intermediate)
    x = make_inputs(spec, tokens, active)
    for out in run_both(spec, x):
        assert_close(out, expect(spec, x), spec.dtype)


@pytest.mark.parametrize("block_m", block_ms(make_spec(dtype=torch.bfloat16)))
def test_every_tile_height(block_m: int) -> None:
    spec = dataclasses.replace(STYLES["gpt-oss"], dtype=torch.bfloat16, experts=2)
    x = make_inputs(spec, tokens=70, active=2)
    with interpreted():
        out = grouped(plan_launches(spec), x, block_m)
    assert_close(out, expect(spec, x), spec.dtype)


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([[0, 1]] * 5, id="experts without tokens"),
        pytest.param([[2, 2]] * 9, id="one expert has them all"),
        pytest.param([[-1, 3], [4, 0], [2**40, 1], [-(2**40), 2]], id="some do not exist"),
        pytest.param([[7, -1]] * 3, id="none exists"),
    ],
)
def test_any_routing(ids: list[list[int]]) -> None:
    spec = STYLES["gpt-oss"]
    x = dataclasses.replace(make_inputs(spec, len(ids), 2), ids=torch.tensor(ids))
    expected = expect(spec, x)
    for out in run_both(spec, x):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_an_expert_that_does_not_exist_contributes_nothing_even_to_nan() -> None:
    spec = make_spec()
    x = make_inputs(spec, tokens=3, active=2)
    x = dataclasses.replace(
        x,
        ids=torch.tensor([[-1, -1], [0, 1], [0, 4]]),
        hidden=x.hidden.index_fill(0, torch.tensor(0), math.nan),
        weights=x.weights.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan)),
    )
    for out in run_both(spec, x):
        assert out.isfinite().all()
        assert not out[0].any()


@pytest.mark.parametrize("style", ["swiglu", "gpt-oss", "relu2", "geglu", "st-moe"])
def test_nan_reaches_its_own_token_and_no_other(style: str) -> None:
    spec = STYLES[style]
    x = make_inputs(spec, tokens=3, active=2)
    x.hidden[1, 5] = math.nan
    for out in run_both(spec, x):
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
def test_nothing_to_do_is_zeros_without_a_launch(shape: tuple[int, int]) -> None:
    spec = make_spec()
    x = make_inputs(spec, *shape)
    out = triton_emitter.emit(spec).run(*tensors(x))  # not interpreted: a launch would raise
    assert out.shape == (shape[0], spec.hidden)
    assert not out.any()


def test_hidden_states_may_be_wider_than_the_weights() -> None:
    spec = make_spec(dtype=torch.bfloat16)
    x = make_inputs(spec, tokens=2, active=2)
    x = dataclasses.replace(x, hidden=x.hidden.float(), ids=x.ids.int())
    for out in run_both(spec, x):
        assert out.dtype == torch.float32
        assert (out - expect(spec, x)).norm() < 1e-2 * out.norm()


def test_inputs_may_be_views() -> None:
    spec = make_spec()
    x = make_inputs(spec, tokens=9, active=2)
    views = dataclasses.replace(x, hidden=x.hidden.T.contiguous().T, ids=x.ids.T.contiguous().T)
    torch.testing.assert_close(run(spec, views), run(spec, x), rtol=0, atol=0)


# Routing


def expected_routing(
    ids: torch.Tensor, experts: int, block_m: int
) -> tuple[list[int], list[list[int]]]:
    """Sort and cut with lists."""
    order, tiles = [], []
    for expert in range(experts):
        first = len(order)
        order += torch.where(ids.flatten() == expert)[0].tolist()
        tiles += [[expert, row, len(order)] for row in range(first, len(order), block_m)]
    return order, tiles


@pytest.mark.parametrize("experts", [1, 5, 33])
@pytest.mark.parametrize(
    ("tokens", "active", "block_m"),
    [(1, 1, 16), (60, 5, 32), (700, 3, 128), (1400, 2, 64)],  # the last needs several programs
)
def test_routing_sorts_and_cuts(tokens: int, active: int, block_m: int, experts: int) -> None:
    spec = make_spec(experts=experts, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(tokens)
    # Squared: some experts are popular. Some ids are out of range on both sides.
    ids = torch.rand(tokens, active, generator=generator).square() * (experts + 2) - 1
    ids = ids.floor().long()
    with interpreted():
        order, tiles = triton_emitter.run_routing(plan_launches(spec), ids, block_m)
    expected_order, expected_tiles = expected_routing(ids, experts, block_m)
    assert order[: len(expected_order)].tolist() == expected_order
    assert tiles[: len(expected_tiles)].tolist() == expected_tiles
    assert (tiles[len(expected_tiles) :, 0] == -1).all()


def test_the_scan_carries_over_from_block_to_block() -> None:
    scan = plan_launches(make_spec()).scan_chunks
    scan = dataclasses.replace(scan, constants={"BLOCK": 16})
    counts = torch.randint(0, 9, (4, 40), dtype=torch.int32)
    before, totals = counts.clone(), torch.empty(4, dtype=torch.int32)
    with interpreted():
        scan((4,), before, totals, 40)
    assert torch.equal(before, counts.cumsum(1) - counts)
    assert torch.equal(totals, counts.sum(1).int())


def test_more_experts_than_assignments() -> None:
    spec = make_spec(experts=300)
    ids = torch.tensor([[299, 0, 150]])
    with interpreted():
        order, tiles = triton_emitter.run_routing(plan_launches(spec), ids, 16)
    assert order.tolist() == [1, 2, 0]
    assert tiles.tolist() == [[0, 0, 1], [150, 1, 2], [299, 2, 3], [-1, *tiles[3, 1:].tolist()]]


# The activation


@triton.jit
def activate(a_ptr, b_ptr, out_ptr, ACTIVATION: tl.constexpr, N: tl.constexpr):
    index = tl.arange(0, N)
    out = ACTIVATION(tl.load(a_ptr + index), tl.load(b_ptr + index), 1.0)
    tl.store(out_ptr + index, out)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_is_what_torch_computes(op: str) -> None:
    gated = OPERATIONS[op] == 2
    expression = apply(op, *((GATE, UP) if gated else (X,)))
    values = [0.0, -0.0, 1e-6, -0.05, 0.0999, 0.1001, 1.0, -3.0, 9.0, -30.0, 100.0, math.nan]
    grid = torch.tensor(values).expand(len(values), -1)
    a, b = (torch.nn.functional.pad(t.flatten(), (0, 112)) for t in (grid, grid.T))
    source = triton_launches.write_activation(expression, gated=gated)
    out = torch.empty_like(a)
    with interpreted():
        activate[(1,)](a, b, out, triton_launches.load_activation(source), len(a))
    leaves = {"gate": a, "up": b} if gated else {"x": a}
    torch.testing.assert_close(
        out, evaluate(expression, **leaves), rtol=2e-6, atol=1e-6, equal_nan=True
    )


def test_the_source_shows_the_activation_and_the_kernels() -> None:
    kernel = triton_emitter.emit(STYLES["swiglu"])
    assert kernel.emitter == "triton"
    assert kernel.source.startswith('"""mul(silu(gate), up)"""')
    assert "return (elementwise.silu(gate) * up)" in kernel.source
    assert "def grouped_gate_up(" in kernel.source


# Refusals


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "cuda"),
        ({"dtype": torch.float64}, "float64"),
        ({"schemes": Schemes(first=SCHEMES["int3"], second=SCHEMES["int4"])}, "int3"),
    ],
    ids=str,
)
def test_declines_what_it_cannot_write(change: dict[str, object], reason: str) -> None:
    with pytest.raises(UnsupportedSpec, match=reason):
        triton_emitter.emit(make_spec(**change))


def test_declines_without_triton() -> None:
    with (
        mock.patch.object(triton_launches, "import_module", side_effect=ImportError("no triton")),
        pytest.raises(UnsupportedSpec, match="no triton"),
    ):
        triton_emitter.emit(make_spec())


def test_the_emitter_is_imported_without_triton() -> None:
    code = "import sys, moecc.codegen.triton_emitter; sys.exit('triton.language' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gate_up", lambda t: t[:, :-1]),
        ("gate_up", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
        ("down", lambda t: t.half()),
        ("hidden", lambda t: t[:, :-1]),
        ("weights", lambda t: t[:-1]),
        ("down_bias", lambda t: torch.zeros(4, 48)),
    ],
)
def test_refuses_tensors_that_do_not_fit(name: str, change: object) -> None:
    x = make_inputs(make_spec(), tokens=3, active=2)
    x = dataclasses.replace(x, **{name: change(getattr(x, name))})
    with pytest.raises(InputError, match=name):
        triton_emitter.emit(make_spec()).run(*tensors(x))


# A GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("style", STYLES)
def test_agrees_with_the_definition_on_a_gpu(style: str) -> None:
    for dtype in TOLERANCE:
        shape = {"hidden": 256, "intermediate": 200, "experts": 8}
        spec = dataclasses.replace(STYLES[style], dtype=dtype, **shape)
        kernel = triton_emitter.emit(spec)
        for tokens in (1, 4, 33, 500, 3000):
            x = make_inputs(spec, tokens, active=2, device="cuda")
            out = kernel.run(*tensors(x))
            assert_close(out, expect(spec, x), dtype)
            assert torch.equal(out, kernel.run(*tensors(x)))

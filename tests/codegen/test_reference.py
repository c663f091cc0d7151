"""The torch definition against the formula, written out."""

import pytest
import torch

from moecc.codegen.activation import GATE, LEARNED, UP, X, apply, evaluate
from moecc.codegen.reference import emit, split_gate_up
from moecc.codegen.spec import KernelSpec

SILU = apply("mul", apply("silu", GATE), UP)
T, K, E, H, I = 7, 2, 5, 12, 6  # noqa: E741


def spec(**changes: object) -> KernelSpec:
    base: dict[str, object] = {
        "hidden": H, "intermediate": I, "experts": E, "dtype": torch.float64, "activation": SILU,
        "gated": True, "interleaved": False, "transposed": False, "down_transposed": False,
        "bias": False, "device": "cpu",
    }  # fmt: skip
    return KernelSpec(**base | changes)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("down_transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_is_the_formula(
    gated: bool, interleaved: bool, transposed: bool, down_transposed: bool, bias: bool, split: bool
) -> None:
    split = split and gated and not interleaved
    one = spec(
        gated=gated, interleaved=interleaved and gated, transposed=transposed,
        down_transposed=down_transposed, bias=bias, split=split,
        activation=SILU if gated else apply("square", apply("relu", X)),
    )  # fmt: skip
    hidden, ids = torch.randn(T, H).double(), torch.randint(0, E, (T, K))
    weights = torch.rand(T, K).double()
    gate_up = torch.randn(E, one.rows, H).double()
    down = torch.randn(E, H, I).double()
    biases = (
        (torch.randn(E, one.rows).double(), torch.randn(E, H).double()) if bias else (None, None)
    )
    expected = torch.zeros(T, H).double()
    for t in range(T):
        for k in range(K):
            e = ids[t, k]
            rows = gate_up[e] @ hidden[t] + (biases[0][e] if bias else 0)
            out = down[e] @ evaluate(one.activation, **split_gate_up(rows, one))
            expected[t] += weights[t, k] * (out + (biases[1][e] if bias else 0))
    if transposed:
        gate_up = gate_up.mT.contiguous()
    if down_transposed:
        down = down.mT.contiguous()
    up = None
    if split:
        gate_up, up = gate_up.chunk(2, dim=2 if transposed else 1)
    got = emit(one).run(hidden, ids, weights, gate_up, down, *biases, up)
    torch.testing.assert_close(got, expected)


def test_the_activation_may_read_a_vector_of_each_expert() -> None:
    one = spec(activation=apply("mul", apply("tanh", apply("mul", LEARNED, GATE)), UP))
    hidden, ids = torch.randn(T, H).double(), torch.randint(0, E, (T, K))
    weights, learned = torch.rand(T, K).double(), torch.randn(E, I).double()
    gate_up, down = torch.randn(E, 2 * I, H).double(), torch.randn(E, H, I).double()
    gates, ups = (hidden @ gate_up.mT).transpose(0, 1).chunk(2, dim=-1)
    every = torch.einsum("tei,ehi->teh", (learned * gates).tanh() * ups, down)
    expected = (every.gather(1, ids[..., None].expand(T, K, H)) * weights[..., None]).sum(1)
    got = emit(one).run(hidden, ids, weights, gate_up, down, None, None, None, learned)
    torch.testing.assert_close(got, expected)


def test_equal_specs_have_equal_keys_and_different_ones_do_not() -> None:
    assert spec().key == spec().key
    changes = [{"interleaved": True}, {"transposed": True}, {"down_transposed": True},
               {"transposed": True, "down_transposed": True}, {"bias": True}, {"split": True},
               {"hidden": 13}, {"dtype": torch.float16}, {"activation": GATE},
               {"device": "cuda"}]  # fmt: skip
    assert len({spec().key, *(spec(**change).key for change in changes)}) == len(changes) + 1


def test_the_experts_operator_passes_torchs_own_checks() -> None:
    from moecc.runtime import ops

    kernel = emit(spec(dtype=torch.float32))
    ops.install(kernel.key, kernel.run)
    args = (
        torch.randn(T, H), torch.randint(0, E, (T, K)), torch.rand(T, K),
        torch.randn(E, 2 * I, H), torch.randn(E, H, I), *[None] * 4, kernel.key,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moecc.experts.default, args, test_utils=checks)
    matrices = [[torch.nn.Parameter(one) for one in each] for each in args[3:5]]
    apart = (*args[:3], *matrices, *args[5:])
    with torch.no_grad():
        # Not test_schema: parameters are moved in memory, which it takes for a write.
        torch.library.opcheck(torch.ops.moecc.experts.apart, apart, test_utils=("test_faketensor",))
        torch.testing.assert_close(
            torch.ops.moecc.experts.apart(*apart), torch.ops.moecc.experts(*args)
        )

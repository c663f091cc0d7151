"""Each product in a layout of its own, native and in the definition: every combination."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch

from moecc.codegen import reference
from moecc.codegen.native import emit as native
from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError
from tests.codegen.native_cases import (
    DTYPES,
    assert_close,
    definition,
    make_batch,
    make_experts,
    make_spec,
    rounding,
)

LAYOUTS = {
    "both output-major": (False, False),
    "down input-major": (False, True),
    "gate and up input-major": (True, False),
    "both input-major": (True, True),
}
MIXED = ("down input-major", "gate and up input-major")
KINDS = {"one tensor": {}, "two": {"split": True}, "with biases": {"bias": True}}

needs_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="native kernels are built on Linux"
)


def spec_of(layout: str, dtype: torch.dtype = torch.float32, **changes: bool) -> KernelSpec:
    """Neither 700 nor 75 is a multiple of a panel, a line or a vector of both products."""
    transposed, down_transposed = LAYOUTS[layout]
    spec = make_spec("silu", dtype, experts=5, h=700, i=75)
    return replace(spec, transposed=transposed, down_transposed=down_transposed, **changes)


@needs_linux
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_computes_what_the_definition_says(layout: str, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    spec = spec_of(layout, dtype, **KINDS[kind])
    run, experts = native.emit(spec).run, make_experts(spec)
    for tokens in (0, 1, 7, 140):  # 140: an expert has more tokens than a chunk
        batch = make_batch(spec, tokens, 2)
        out = run(*batch, *experts)
        assert out.shape == (tokens, spec.hidden)
        assert out.dtype == dtype
        error = (out.double() - definition(spec, batch, experts)).norm()
        assert error <= rounding(spec, batch, experts)


@needs_linux
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_and_other_tokens_change_no_bit(layout: str, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(1)
    spec = spec_of(layout, dtype, **KINDS[kind])
    run, experts, batch = native.emit(spec).run, make_experts(spec), make_batch(spec, 140, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(*batch, *experts)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(*batch, *experts), alone)
    finally:
        torch.set_num_threads(before)
    for count in (1, 2, 3, 5, 29):
        assert torch.equal(run(*(part[:count] for part in batch), *experts), alone[:count])


@needs_linux
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_is_bit_for_bit_concatenated(layout: str, dtype: torch.dtype) -> None:
    spec = spec_of(layout, dtype)
    batch, (gate_up, down, *_) = make_batch(spec, 60, 2), make_experts(spec)
    gate, up = gate_up.chunk(2, dim=2 if spec.transposed else 1)
    for emit in (native.emit, reference.emit):
        joined = emit(spec).run(*batch, gate_up, down, None, None)
        two = emit(replace(spec, split=True)).run(*batch, gate, down, None, None, up)
        assert torch.equal(two, joined)


@needs_linux
@pytest.mark.parametrize("layout", MIXED)
def test_reads_each_product_wherever_it_lies(layout: str) -> None:
    spec = spec_of(layout, torch.bfloat16, split=True)
    batch, (gate, down, *_, up, _) = make_batch(spec, 60, 2), make_experts(spec)
    run = native.emit(spec).run
    plain = run(*batch, gate, down, None, None, up)
    parts: list[torch.Tensor] = []
    for step, one in enumerate((gate, down, up), start=1):  # no two have the same strides
        experts, rows, columns = one.shape
        apart = torch.full((2 * experts, step * rows, columns + 7 * step), torch.nan).bfloat16()
        parts.append(apart[1::2, ::step, step : step + columns].copy_(one))
    assert torch.equal(run(*batch, *parts[:2], None, None, parts[2]), plain)


@needs_linux
@pytest.mark.parametrize("layout", MIXED)
@pytest.mark.parametrize("place", [0, 1, 4], ids=["gate", "down", "up"])
def test_nan_in_one_expert_reaches_its_own_tokens(place: int, layout: str) -> None:
    spec = spec_of(layout, torch.bfloat16, split=True)
    batch, experts = make_batch(spec, 40, 2), make_experts(spec)
    clean = native.emit(spec).run(*batch, *experts)
    experts[place] = experts[place].clone()
    experts[place][3] = torch.nan
    out = native.emit(spec).run(*batch, *experts)
    touched = (batch[1] == 3).any(dim=1)
    assert out[touched].isnan().all()
    assert torch.equal(out[~touched], clean[~touched])


@needs_linux
@pytest.mark.parametrize("layout", MIXED)
def test_a_product_in_the_layout_of_the_other_is_named(layout: str) -> None:
    spec = spec_of(layout, split=True)
    batch, (gate, down, *_, up, _) = make_batch(spec, 3, 2), make_experts(spec)
    run = native.emit(spec).run
    with pytest.raises(InputError, match=r"down is .*expected"):
        run(*batch, gate, down.mT.contiguous(), None, None, up)
    with pytest.raises(InputError, match=r"gate_up is .*expected"):
        run(*batch, gate.mT.contiguous(), down, None, None, up)
    with pytest.raises(InputError, match=r"up is .*expected"):
        run(*batch, gate, down, None, None, up.mT.contiguous())


@needs_linux
@pytest.mark.parametrize("layout", LAYOUTS)
def test_square_matrices_are_read_in_the_layout_that_the_spec_says(layout: str) -> None:
    """No shape tells the layouts apart where H = I: the numbers must."""
    spec = replace(spec_of(layout, split=True), hidden=24, intermediate=24)
    batch, experts = make_batch(spec, 5, 2), make_experts(spec)
    gate, down, *_, up, _ = experts
    if spec.transposed:
        gate, up = gate.mT, up.mT
    if spec.down_transposed:
        down = down.mT
    hidden, ids, weights = batch
    wanted = torch.zeros_like(hidden)
    for token, slot in itertools.product(range(5), range(2)):
        expert, x = ids[token, slot], hidden[token]
        inner = torch.nn.functional.silu(gate[expert] @ x) * (up[expert] @ x)
        wanted[token] += weights[token, slot] * (down[expert] @ inner)
    for emit in (native.emit, reference.emit):
        assert_close(emit(spec).run(*batch, *experts), wanted, 1e-5)

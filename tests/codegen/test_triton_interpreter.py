"""The interpreter that the other tests trust; a new triton may break it."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")

import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from moecc.codegen import aot, triton_emitter  # noqa: E402
from moecc.codegen.triton_launches import plan_launches  # noqa: E402
from tests.codegen.triton_cases import make_inputs, make_spec, tensors  # noqa: E402
from tests.codegen.triton_interpreter import interpreted  # noqa: E402


@triton.jit
def polynomial(x_ptr, out_ptr, N: tl.constexpr):
    index = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, (x * x + 1.0).to(tl.bfloat16) * x.to(tl.float32).to(tl.bfloat16))


@triton.jit
def store_at_the_start(out_ptr):
    tl.store(out_ptr + tl.arange(0, 16), 1.0)


@triton.jit
def dot(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def test_bfloat16_is_computed_and_rounded_as_in_torch() -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty_like(x)
    with interpreted():
        polynomial[(2,)](x, out, 128)
    assert torch.equal(out, (x * x + 1.0) * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(32, 32)
    with interpreted():
        dot[(1,)](a, b, out, 32)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_an_access_out_of_bounds_is_an_error() -> None:
    with interpreted(), pytest.raises(Exception, match="outside"):
        polynomial[(3,)](torch.zeros(256), torch.zeros(512, dtype=torch.bfloat16), 128)


@triton.jit
def copy_block(desc, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.reshape(desc.load([0, 0]), (N,)))


def test_a_descriptor_of_more_than_the_tensor_is_an_error() -> None:
    x = torch.zeros(2, 16)
    with interpreted():
        copy_block[(1,)](TensorDescriptor(x, [2, 16], [16, 1], [2, 16]), torch.zeros(32), 32)
        with pytest.raises(Exception, match="outside"):
            copy_block[(1,)](
                TensorDescriptor(x[:1], [2, 16], [16, 1], [2, 16]), torch.zeros(32), 32
            )


def test_a_race_between_programs_is_an_error() -> None:
    with interpreted(), pytest.raises(RuntimeError, match="store to one place"):
        store_at_the_start[(2,)](torch.zeros(16))


def test_a_kernel_can_be_interpreted_and_then_compiled() -> None:
    spec = make_spec()
    with interpreted():
        triton_emitter.emit(spec).run(*tensors(make_inputs(spec, tokens=1, active=2)))
    assert aot.compile_kernel(spec, plan_launches(spec).decode_down, "sm_90").registers > 0

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import moecc
from moecc.codegen.native import isa
from moecc.passes import dense_linears as page
from moecc.passes.dense_linears import dense_linears
from moecc.passes.detect_moe import detect_moe
from moecc.passes.fuse_routers import fuse_routers
from moecc.passes.fuse_shared import fuse_shared
from moecc.passes.insert_prefetch import insert_prefetch
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import PIPELINE, Result, run
from moecc.passes.text import graph_diff
from moecc.runtime import ops
from moecc.runtime.errors import OptionError, StrictError
from moecc.runtime.schemes.packing import dequantize, quantize
from moecc.runtime.schemes.scheme import INT8_GROUPS, int4
from tests.models import HIDDEN, GroupedMoe, capture, relative_error, tokens

H, KERNEL = 48, "native: linear bfloat16 cpu"
ON = Options(dense_linears=True)


class Mlp(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 70), nn.Linear(70, H, bias=False)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.up(x)))


def rows(count: int = 6, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(count, H, dtype=dtype)


def handed(gm: Any, options: Options = ON, **program: Any) -> Result:
    return run(Program(gm=gm, **program), options, (dense_linears,), keep_text=True)


def test_names_a_kernel_in_each_layer(golden: Callable[[str], None]) -> None:
    result = handed(capture(Mlp(), rows()).gm)
    step = result.steps[0]
    golden(graph_diff(step.before, step.after, "dense_linears") + "\n")
    shapes = [(one.path, one.inputs, one.outputs) for one in result.program.linears]
    assert shapes == [("up", H, 70), ("down", 70, H)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_numbers(dtype: torch.dtype) -> None:
    model, x = Mlp(dtype), rows(6, dtype)
    captured = capture(model, x)
    assert handed(captured.gm).steps[0].rewrites == 2
    got = captured.run()
    with torch.no_grad():
        assert relative_error(got, model.double()(x.double())) < 2 * torch.finfo(dtype).eps


def test_running_twice_is_running_once() -> None:
    once = handed(capture(Mlp(), rows()).gm)
    twice = run(once.program, ON, (dense_linears,), keep_text=True)
    assert twice.steps[0].after == once.steps[0].after
    assert twice.program == once.program


class Computed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight * 2, self.bias)


class Mixed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return super().forward(x)


class Turned(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous().T)


@pytest.mark.parametrize("kind", [Computed, Mixed, Turned])
def test_leaves_alone_what_the_kernel_does_not_read(kind: type[nn.Linear]) -> None:
    captured = capture(kind(H, 8).bfloat16(), rows())
    assert handed(captured.gm).steps[0].rewrites == 0


def test_leaves_other_dtypes_alone() -> None:
    captured = capture(Mlp(torch.float32), rows(dtype=torch.float32))
    assert handed(captured.gm).steps[0].rewrites == 0


@pytest.mark.parametrize("arithmetic", [True, False])
def test_auto_asks_whether_the_cpu_computes_in_the_dtype(
    arithmetic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXXFLAGS", f"-march={'cooperlake' if arithmetic else 'haswell'}")
    assert isa.multiplies(torch.bfloat16) == arithmetic
    step = handed(capture(Mlp(), rows()).gm, Options()).steps[0]
    assert step.rewrites == (0 if arithmetic else 2)
    assert step.note.startswith("off: the CPU computes in" if arithmetic else "2 layers, ")


@pytest.mark.parametrize(
    ("options", "trains"),
    [
        (Options(dense_linears=False), False),
        (Options(dense_linears=True, kernels="torch"), False),
        (Options(dense_linears=True), True),
    ],
)
def test_says_why_it_is_off(options: Options, trains: bool) -> None:
    step = handed(capture(Mlp(), rows()).gm, options, trains=trains).steps[0]
    assert step.rewrites == 0
    assert step.note.startswith("off: ")


def test_without_a_compiler_torch_computes_them_and_it_is_a_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    page.linear._load.cache_clear()
    captured = capture(Mlp(), rows())
    (miss,) = handed(captured.gm, Options()).misses
    assert miss.fallback
    assert miss.why.startswith("torch computes 2 linear layers in torch.bfloat16: no C++ compiler")
    with pytest.raises(StrictError, match="Install g"):
        handed(captured.gm, Options(strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scheme_has_layers_read_low_bit_copies(dtype: torch.dtype) -> None:
    model, x = Mlp(dtype), rows(6, dtype)
    captured = capture(model, x)
    result = handed(captured.gm, Options(dense_linears={"up": "int8-g32", "*": "int4"}))
    name = str(dtype).removeprefix("torch.")
    assert [one.kernel for one in result.program.linears] == [
        f"native {scheme}: linear {name} cpu" for scheme in ("int8-g32", "int4-g32")
    ]
    with torch.no_grad():
        for part, scheme in ((model.up, INT8_GROUPS), (model.down, int4())):
            stands_for = dequantize(quantize(part.weight, scheme), scheme)
            part.weight.copy_(stands_for[:, : part.in_features])  # its own nearest codes
        assert 0 < relative_error(captured.run(), model(x)) < 0.02  # inputs have 8 bits


def test_layers_that_score_experts_and_gates_are_not_rounded() -> None:
    class Gated(GroupedMoe):
        def __init__(self) -> None:
            super().__init__(experts=16)
            self.out, self.gate = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1)
            self.bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(super().forward(x)) * self.gate(x).sigmoid()

    program = Program(gm=capture(Gated(), tokens(6)).gm)
    result = run(program, Options(dense_linears="int8", kernels="native"))
    kernels = {one.path: one.kernel for one in result.program.linears}
    lossless = {} if isa.multiplies(torch.bfloat16) else {"pick.proj": KERNEL, "gate": KERNEL}
    assert kernels == lossless | {"out": "native int8: linear bfloat16 cpu"}


@pytest.mark.parametrize(
    ("options", "why"),
    [({"kernels": "auto"}, "not in int8: its weight is computed"), ({"kernels": "torch"}, "int8")],
)
def test_a_scheme_that_is_not_followed_is_a_fallback(options: dict[str, Any], why: str) -> None:
    captured = capture(Computed(H, 24).bfloat16(), rows())
    (miss,) = handed(captured.gm, Options(dense_linears="int8", **options)).misses
    assert miss.fallback
    assert why in miss.why


def test_lengths_share_a_graph_and_calls_are_counted() -> None:
    model = Mlp()
    compiled = torch.compile(
        model, backend="moecc", dynamic=True, options={"dense_linears": True, "strict": True}
    )
    before = ops.calls[KERNEL]
    with torch.no_grad():
        for count in (5, 9, 64):
            x = rows(count)
            assert relative_error(compiled(x), model(x)) < 2**-7
    report = moecc.report(model)
    assert len(report.graphs) == 1
    assert [one["kernel"] for one in report.graphs[0].linears] == [KERNEL, KERNEL]
    assert f"{KERNEL}: 2 layers" in str(report)
    assert ops.calls[KERNEL] == before + 6


def test_gradients_are_kept() -> None:
    model = Mlp()
    options = {"dense_linears": True, "inner": "eager"}
    torch.compile(model, backend="moecc", options=options)(rows()).sum().backward()
    assert model.up.weight.grad is not None


def test_routers_are_read_before_their_linear_layer_is_replaced() -> None:
    readers = (detect_moe, insert_prefetch, fuse_shared, fuse_routers)
    assert PIPELINE.index(dense_linears) > max(map(PIPELINE.index, readers))


def test_the_option_is_checked() -> None:
    for value in (False, "auto", "int8", {"*.down": "int4"}):
        assert Options.parse({"dense_linears": value}).dense_linears == value
    with pytest.raises(
        OptionError, match="'dense_linears' is 'yes'; allowed: True, False, 'auto', one"
    ):
        Options.parse({"dense_linears": "yes"})

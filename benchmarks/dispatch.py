"""Time what a call costs around its kernel, from a graph that inductor compiled.

    python -m benchmarks.dispatch

Two graphs with a few and with many calls of one tiny block; the difference is free of what a graph
costs by itself. The kernel alone is called through ctypes with arguments that are ready.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch._inductor.config

from benchmarks.swiglu import swiglu_spec
from benchmarks.timing import machine
from moecc.codegen.native import emit as native
from moecc.runtime import ops

FEW, MANY = 1, 33
SPEC = swiglu_spec({"hidden": 32, "intermediate": 32, "experts": 4}, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Microseconds of one call of a tiny block."""

    call: float
    """In a compiled graph."""
    kernel: float

    @property
    def cost(self) -> float:
        """Give what is not the kernel."""
        return self.call - self.kernel


def measure() -> Dispatch:
    """Time calls of a tiny block with one thread, so that no thread is waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    try:
        with torch.inference_mode():
            return _measure()
    finally:
        torch.set_num_threads(threads)


def _measure() -> Dispatch:
    hidden, ids = torch.randn(1, SPEC.hidden), torch.tensor([[0, 2]])
    weights = torch.full(ids.shape, 0.5)
    gate_up = torch.randn(SPEC.experts, SPEC.rows, SPEC.hidden)
    down = torch.randn(SPEC.experts, SPEC.hidden, SPEC.intermediate)
    inputs = hidden, ids, weights, gate_up, down
    ops.install(SPEC.key, native.emit(SPEC).run)
    few, many = (_median(torch.compile(_calls(count)), inputs) for count in (FEW, MANY))
    ready: list[Callable[[], object]] = []
    function = native._load(native.write(SPEC))

    def load(_: str) -> Callable[..., int]:
        return lambda layer: ready.append(lambda: function(layer)) or function(layer)

    with mock.patch.object(native, "_load", load):
        out = native.emit(SPEC).run(*inputs, None, None)
    kernel = _median(ready[0], ())
    del out  # where the kernel has written
    return Dispatch(call=(many - few) / (MANY - FEW), kernel=kernel)


def _calls(count: int) -> Callable[..., torch.Tensor]:
    def run(hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        for _ in range(count):
            hidden = torch.ops.moecc.experts(hidden, *others, *[None] * 4, SPEC.key)
        return hidden

    return run


def _median(call: Callable[..., object], inputs: tuple[torch.Tensor, ...]) -> float:
    for _ in range(20):
        call(*inputs)
    taken: list[float] = []
    for _ in range(500):
        start = time.perf_counter()
        call(*inputs)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e6


def describe(dispatch: Dispatch) -> str:
    """Say it in a line."""
    return (
        f"a call from a compiled graph: {dispatch.cost:.1f} us around its kernel "
        f"(a tiny block: {dispatch.call:.1f} us, of which kernel {dispatch.kernel:.1f})"
    )


if __name__ == "__main__":
    print(machine())
    print(describe(measure()))

"""Write the experts kernel in Triton, for CUDA devices.

Two algorithms, chosen per call from T and K by `triton_tiles`:

    decode     decode_gate_up -> decode_down
               few tokens: bound by reading weights, one row at a time
    grouped    route -> grouped_gate_up -> grouped_down -> reduce_terms
               rows sorted by expert, tensor cores

The kernels are ordinary files in `codegen/kernels`. What is written per spec is its activation, a
function that the kernels take as a compile-time argument. H, I, E and the layout are baked; T and K
are not: a call compiles at most once per tile height.

No call synchronises with the device, so all can be captured in a CUDA graph. Results do not depend
on which other tokens share the batch, except for the last bits: the algorithms, and tiles of
different height, add in different orders.
"""

import hashlib
import inspect
import linecache
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from moecc.codegen.activation import Expr, render
from moecc.codegen.spec import ExpertsFn, Kernel, KernelSpec
from moecc.codegen.triton_tiles import (
    Tile,
    block_ms,
    choose_block_m,
    decode_tile,
    grouped_tile,
    power_of_two,
    prefers_decode,
)
from moecc.runtime.errors import InputError, UnsupportedSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUTE_CHUNK = 256
"""Assignments ranked at a time; each is compared with all, 256 comparisons a thread."""
MAX_ROUTE = 8 * ROUTE_CHUNK
"""Up to here one program sorts the assignments; above, a program per chunk and three launches."""
SCAN_BLOCK = 1024
REDUCE_BLOCK = 1024

ACTIVATION_TABLE: Mapping[str, str] = {
    "abs": "tl.abs({0})",
    "add": "({0} + {1})",
    "constant": "{0}",
    "div": "({0} / {1})",
    "exp": "tl.exp({0})",
    "gate": "gate",
    "gelu": "elementwise.gelu({0})",
    "gelu_tanh": "elementwise.gelu_tanh({0})",
    "max": "elementwise.maximum({0}, {1})",
    "min": "elementwise.minimum({0}, {1})",
    "mul": "({0} * {1})",
    "neg": "(-{0})",
    "relu": "elementwise.maximum({0}, 0.0)",
    "sigmoid": "tl.sigmoid({0})",
    "silu": "elementwise.silu({0})",
    "square": "elementwise.square({0})",
    "sub": "({0} - {1})",
    "tanh": "elementwise.tanh({0})",
    "up": "up",
    "x": "x",
}
ACTIVATION_SOURCE = '''\
"""{expression}"""

import triton
import triton.language as tl
from moecc.codegen.kernels import elementwise


@triton.jit
def activation({leaves}):
    return {body}
'''


def write_activation(expression: Expr, *, gated: bool) -> str:
    """Write the module whose `activation(gate, up)`, or `activation(x)`, computes the expression."""
    return ACTIVATION_SOURCE.format(
        expression=expression,
        leaves="gate, up" if gated else "x",
        body=render(expression, ACTIVATION_TABLE),
    )


@cache
def load_activation(source: str) -> Any:
    """Import the emitted module and return its `activation`, a `triton.JITFunction`.

    Triton reads a function's source through `inspect`, which finds what `linecache` holds: no file
    is needed, so there is no folder of code to protect.
    """
    name = f"moecc_activation_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, filename, "exec"), namespace)
    return namespace["activation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A kernel as it is compiled: a function, what is baked into it, its warps and stages."""

    kernel: Any
    """The `triton.JITFunction`."""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        """Print as in reports: `grouped_down 64x128x64`."""
        blocks = [str(self.constants[b]) for b in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if b in self.constants]
        return f"{self.kernel.__name__} {'x'.join(blocks)}".strip()

    def __call__(self, grid: tuple[int, ...], *arguments: object) -> None:
        """Run on the current device and stream."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[grid](*arguments, **self.constants, **options)

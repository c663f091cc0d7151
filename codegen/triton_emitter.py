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
from importlib import import_module
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
    """Write the module that defines `activation(gate, up)`, or `activation(x)` if not gated."""
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
        blocks = [
            str(self.constants[b]) for b in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if b in self.constants
        ]
        return f"{self.kernel.__name__} {'x'.join(blocks)}".strip()

    def __call__(self, grid: tuple[int, ...], *arguments: object) -> None:
        """Run on the current device and stream."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[grid](*arguments, **self.constants, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedLaunches:
    """The kernels that depend on the height of the grouped tiles."""

    route: Launch
    place_chunks: Launch
    gate_up: Launch
    down: Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """Every kernel that a spec may run."""

    spec: KernelSpec
    activation: str
    """Source of the emitted module."""
    decode_gate_up: Launch
    decode_down: Launch
    count_experts: Launch
    scan_chunks: Launch
    reduce_terms: Launch
    grouped: Mapping[int, GroupedLaunches]
    """By tile height."""

    def every(self) -> list[Launch]:
        """List the kernels, those that differ only in tile height one after the other."""
        parts = ("route", "place_chunks", "gate_up", "down")
        grouped = [
            getattr(by_height, part) for part in parts for by_height in self.grouped.values()
        ]
        rest = (self.count_experts, self.scan_chunks, self.reduce_terms)
        return [self.decode_gate_up, self.decode_down, *rest, *grouped]


def _import_kernel(name: str, module: str | None = None) -> Any:
    """Import a `triton.JITFunction`; raises `UnsupportedSpec` where triton cannot be imported."""
    try:
        return getattr(import_module(f"moecc.codegen.kernels.{module or name}"), name)
    except ImportError as error:
        raise UnsupportedSpec(f"triton cannot be imported ({error}): pip install triton") from error


def plan_launches(spec: KernelSpec) -> Launches:
    """Bake every kernel that the spec may run; compiles nothing.

    Raises `UnsupportedSpec` where triton cannot be imported.
    """
    reduce_terms = _import_kernel("reduce_terms")
    source = write_activation(spec.activation, gated=spec.gated)
    baked: dict[str, Any] = {
        "HIDDEN": spec.hidden,
        "INTERMEDIATE": spec.intermediate,
        "EXPERTS": spec.experts,
        "GATED": spec.gated,
        "INTERLEAVED": spec.interleaved,
        "TRANSPOSED": spec.transposed,
        "ACTIVATION": load_activation(source),
        "BLOCK_E": max(power_of_two(spec.experts), 32),
    }

    def bake(kernel: Any, num_warps: int = 4, num_stages: int = 3, **blocks: int) -> Launch:
        known = baked | blocks
        return Launch(
            kernel=kernel,
            constants={name: known[name] for name in kernel.arg_names if name in known},
            num_warps=num_warps,
            num_stages=num_stages,
        )

    def bake_tile(name: str, tile: Tile) -> Launch:
        blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        return bake(_import_kernel(name), tile.num_warps, tile.num_stages, **blocks)

    def bake_routing(name: str, module: str, num_warps: int, **blocks: int) -> Launch:
        return bake(_import_kernel(name, module), num_warps, BLOCK=ROUTE_CHUNK, **blocks)

    hidden, inner, products = spec.hidden, spec.intermediate, 2 if spec.gated else 1
    return Launches(
        spec=spec,
        activation=source,
        decode_gate_up=bake_tile("decode_gate_up", decode_tile(spec, inner, hidden)),
        decode_down=bake_tile("decode_down", decode_tile(spec, hidden, inner)),
        count_experts=bake_routing("count_experts", "routing_chunked", 4),
        scan_chunks=bake(_import_kernel("scan_chunks", "routing_chunked"), BLOCK=SCAN_BLOCK),
        reduce_terms=bake(reduce_terms, BLOCK=min(REDUCE_BLOCK, power_of_two(hidden))),
        grouped={
            m: GroupedLaunches(
                route=bake_routing("route", "routing", 8, BLOCK_M=m),
                place_chunks=bake_routing("place_chunks", "routing_chunked", 8, BLOCK_M=m),
                gate_up=bake_tile(
                    "grouped_gate_up", grouped_tile(spec, m, inner, hidden, products)
                ),
                down=bake_tile("grouped_down", grouped_tile(spec, m, hidden, inner, 1)),
            )
            for m in block_ms(spec)
        },
    )


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The tensors of one call, as `ExpertsFn` lists them."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


def run_decode(launches: Launches, x: Inputs) -> torch.Tensor:
    """Run the decode kernels."""
    spec, (tokens, active) = launches.spec, x.ids.shape
    inner = x.hidden.new_empty(tokens * active, spec.intermediate, dtype=spec.dtype)
    first, second = launches.decode_gate_up, launches.decode_down
    grid = (_blocks(spec.intermediate, first.constants["BLOCK_N"]), tokens * active)
    first(grid, x.hidden, x.ids, x.gate_up, x.gate_up_bias, inner, active)
    out = torch.empty_like(x.hidden)
    grid = (_blocks(spec.hidden, second.constants["BLOCK_N"]), tokens)
    second(grid, inner, x.ids, x.weights, x.down, x.down_bias, out, active)
    return out


def bound_tiles(assignments: int, experts: int, block_m: int) -> int:
    """Bound the number of row tiles without asking the device: an expert adds one partial tile."""
    return _blocks(assignments, block_m) + min(assignments, experts)


def run_routing(
    launches: Launches, ids: torch.Tensor, block_m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the assignments; returns `order` and `tiles` as `kernels/routing.py` defines them."""
    spec, grouped, assignments = launches.spec, launches.grouped[block_m], ids.numel()
    num_tiles = bound_tiles(assignments, spec.experts, block_m)
    order = ids.new_empty(assignments, dtype=torch.int32)
    tiles = ids.new_empty(num_tiles, 3, dtype=torch.int32)
    if assignments <= MAX_ROUTE:
        grouped.route((1,), ids, order, tiles, assignments, num_tiles)
        return order, tiles
    chunks = _blocks(assignments, ROUTE_CHUNK)
    counts = ids.new_empty(spec.experts, chunks, dtype=torch.int32)
    totals = ids.new_empty(spec.experts, dtype=torch.int32)
    launches.count_experts((chunks,), ids, counts, assignments)
    launches.scan_chunks((spec.experts,), counts, totals, chunks)
    grouped.place_chunks((chunks + 1,), ids, counts, totals, order, tiles, assignments, num_tiles)
    return order, tiles


def run_grouped(launches: Launches, x: Inputs, block_m: int) -> torch.Tensor:
    """Run the grouped kernels with tiles of `block_m` rows."""
    spec, grouped, (tokens, active) = launches.spec, launches.grouped[block_m], x.ids.shape
    order, tiles = run_routing(launches, x.ids, block_m)
    assignments, num_tiles = tokens * active, len(tiles)
    inner = x.hidden.new_empty(assignments, spec.intermediate, dtype=spec.dtype)
    terms = x.hidden.new_empty(assignments, spec.hidden, dtype=spec.dtype)
    grid = (num_tiles * _blocks(spec.intermediate, grouped.gate_up.constants["BLOCK_N"]),)
    tensors = (x.hidden, x.gate_up, x.gate_up_bias, order, tiles, inner)
    grouped.gate_up(grid, *tensors, active, num_tiles)
    grid = (num_tiles * _blocks(spec.hidden, grouped.down.constants["BLOCK_N"]),)
    grouped.down(grid, inner, x.down, x.down_bias, x.weights, order, tiles, terms, num_tiles)
    out = torch.empty_like(x.hidden)
    grid = (tokens, _blocks(spec.hidden, launches.reduce_terms.constants["BLOCK"]))
    launches.reduce_terms(grid, terms, x.ids, out, active)
    return out


def check_inputs(spec: KernelSpec, x: Inputs) -> None:
    """Refuse tensors that the kernels would read out of bounds or in the wrong layout.

    Raises `InputError` naming the tensor, what it is and what the spec asks for.
    """
    experts, hidden, inner, rows = spec.experts, spec.hidden, spec.intermediate, spec.rows
    weights = {
        "gate_up": (x.gate_up, (hidden, rows) if spec.transposed else (rows, hidden)),
        "down": (x.down, (inner, hidden) if spec.transposed else (hidden, inner)),
    }
    for name, (tensor, matrix) in weights.items():
        shape = (experts, *matrix)
        if (tensor.shape, tensor.dtype) != (shape, spec.dtype) or not tensor.is_contiguous():
            raise InputError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}; "
                f"{spec.key!r} needs a contiguous {spec.dtype} {list(shape)}"
            )
    others: dict[str, tuple[torch.Tensor | None, tuple[int, ...] | None]] = {
        "hidden": (x.hidden, (x.ids.shape[0], hidden)),
        "weights": (x.weights, tuple(x.ids.shape)),
        "gate_up_bias": (x.gate_up_bias, (experts, rows) if spec.bias else None),
        "down_bias": (x.down_bias, (experts, hidden) if spec.bias else None),
    }
    for name, (tensor, shape) in others.items():
        given = None if tensor is None else tuple(tensor.shape)
        if given != shape:
            raise InputError(f"{name} is {given}; {spec.key!r} needs {shape}")


def bind(launches: Launches) -> ExpertsFn:
    """Make the function that chooses an algorithm and runs it."""
    spec = launches.spec

    def run(
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        x = Inputs(
            hidden=hidden.contiguous(),
            ids=ids.contiguous(),
            weights=weights.contiguous(),
            gate_up=gate_up,
            down=down,
            gate_up_bias=None if gate_up_bias is None else gate_up_bias.contiguous(),
            down_bias=None if down_bias is None else down_bias.contiguous(),
        )
        check_inputs(spec, x)
        tokens, active = ids.shape
        if tokens * active == 0:
            return torch.zeros_like(x.hidden)
        with torch.cuda.device_of(hidden):  # Triton launches on the current device
            if prefers_decode(spec, tokens, active):
                return run_decode(launches, x)
            return run_grouped(launches, x, choose_block_m(spec, tokens, active))

    return run


def emit(spec: KernelSpec) -> Kernel:
    """Write the kernel of a spec; the first call compiles it.

    Raises `UnsupportedSpec` with the reason: not a CUDA device, not a dtype that the kernels know,
    or no triton.
    """
    if spec.device != "cuda":
        raise UnsupportedSpec(f"the triton kernels run on cuda devices, not on {spec.device!r}")
    if spec.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UnsupportedSpec(f"the triton kernels take {known} weights, not {spec.dtype}")
    launches = plan_launches(spec)
    modules = dict.fromkeys(inspect.getmodule(launch.kernel.fn) for launch in launches.every())
    source = "\n\n".join(
        [launches.activation, *(inspect.getsource(module) for module in modules if module)]
    )
    return Kernel(spec=spec, emitter="triton", run=bind(launches), source=source)

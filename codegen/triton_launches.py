"""Say which Triton kernels a spec runs, and with what baked in.

H, I, E, the layout, the blocks and the activation are compile-time arguments. The activation is the
one thing that is written per spec: a module with a single function, rendered from the expression.
Nothing is compiled here; triton is imported when `plan_launches` is called.
"""

import hashlib
import linecache
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import Any

from moecc.codegen.activation import Expr, render
from moecc.codegen.gpus import GPUS, Gpu
from moecc.codegen.spec import KernelSpec
from moecc.codegen.triton_costs import MAX_ROUTE, ROUTE_CHUNK, Plan
from moecc.codegen.triton_descriptors import describe_tensor, persistent_blocks
from moecc.codegen.triton_packed import describe
from moecc.codegen.triton_tiles import (
    PERSISTENT_M,
    Tile,
    block_ms,
    can_persist,
    decode_tile,
    grouped_tile,
    persistent_tile,
    power_of_two,
)
from moecc.runtime.errors import UnsupportedSpec

SCAN_BLOCK = 1024
REDUCE_BLOCK = 1024
CHOICES = 32
"""Experts of a token that kernels which add them up take at least; more compile anew."""

ACTIVATION_TABLE: Mapping[str, str] = {
    "abs": "tl.abs({0})",
    "add": "({0} + {1})",
    "constant": "{0}",
    "div": "({0} / {1})",
    "exp": "tl.exp({0})",
    "gate": "gate",
    "gelu": "elementwise.gelu({0})",
    "gelu_tanh": "elementwise.gelu_tanh({0})",
    "learned": "learned",
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
def activation({first}, up, learned):
    return {body}
'''


def write_activation(expression: Expr, *, gated: bool) -> str:
    """Write the module that defines `activation(gate, up, learned)`; `x` is first if not gated."""
    return ACTIVATION_SOURCE.format(
        expression=expression,
        first="gate" if gated else "x",
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
    max_registers: int | None = None
    """Of a thread, if the assembler is told."""
    descriptors: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """The tensors that are read by descriptor, and the blocks in which they are."""

    @property
    def options(self) -> dict[str, Any]:
        """Give what triton's compiler takes beside the source."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})

    def __str__(self) -> str:
        """Print as in reports: `grouped_down 64x128x64`."""
        blocks = [
            str(self.constants[b]) for b in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if b in self.constants
        ]
        swapped = " swapped" if self.constants.get("SWAPPED") else ""
        return f"{self.kernel.__name__} {'x'.join(blocks)}".strip() + swapped

    def __call__(self, grid: tuple[int, ...], *arguments: object, **constants: int) -> None:
        """Run on the current device and stream; `constants` stand in for those of the plan."""
        given = list(arguments)
        for name, block in self.descriptors.items():
            number = self.kernel.arg_names.index(name)
            given[number] = describe_tensor(given[number], block)
        self.kernel[grid](*given, **{**self.constants, **constants}, **self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedLaunches:
    """The kernels that depend on the height of the grouped tiles."""

    route: Launch
    place_chunks: Launch
    gate_up: Launch
    down: Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """Every kernel that a spec may run on a GPU."""

    spec: KernelSpec
    gpu: Gpu
    activation: str
    """Source of the emitted module."""
    decode_gate_up: Launch
    decode_down: Launch
    count_experts: Launch
    scan_chunks: Launch
    reduce_terms: Launch
    grouped: Mapping[int, GroupedLaunches]
    """By tile height."""
    persistent: GroupedLaunches | None
    """For many tiles, where the GPU and the weights allow."""

    def of(self, plan: Plan, assignments: int) -> list[Launch]:
        """List what a plan runs, in its order."""
        if plan.block_m is None:
            return [self.decode_gate_up, self.decode_down]
        grouped = self.persistent if plan.persistent else self.grouped[plan.block_m]
        assert grouped
        chunked = [self.count_experts, self.scan_chunks, grouped.place_chunks]
        routing = [grouped.route] if assignments <= MAX_ROUTE else chunked
        return [*routing, grouped.gate_up, grouped.down, self.reduce_terms]

    def helpers(self) -> list[Any]:
        """List a function of each module that the kernels call."""
        packed = [import_kernel("load_packed", "low_bit")] if self.spec.schemes else []
        modules = (("locate", "choices"), ("load_tile", "tiles"), ("add_shared", "shared"))
        return [*(import_kernel(*one) for one in modules), *packed]

    def every(self) -> list[Launch]:
        """List the kernels, those that differ only in tile height one after the other."""
        parts = ("route", "place_chunks", "gate_up", "down")
        grouped = [
            getattr(by_height, part) for part in parts for by_height in self.grouped.values()
        ]
        rest = (self.count_experts, self.scan_chunks, self.reduce_terms)
        if self.persistent:
            grouped += [self.persistent.gate_up, self.persistent.down]
        return [self.decode_gate_up, self.decode_down, *rest, *grouped]


def import_kernel(name: str, module: str | None = None) -> Any:
    """Import a `triton.JITFunction`; raises `UnsupportedSpec` where triton cannot be imported."""
    try:
        return getattr(import_module(f"moecc.codegen.kernels.{module or name}"), name)
    except ImportError as error:
        raise UnsupportedSpec(f"triton cannot be imported ({error}): pip install triton") from error


def plan_launches(spec: KernelSpec, gpu: Gpu = GPUS["sm_90"]) -> Launches:
    """Bake every kernel that the spec may run on a GPU; compiles nothing.

    Raises `UnsupportedSpec` where triton cannot be imported, and for schemes that kernels lack.
    """
    reduce_terms = import_kernel("reduce_terms")
    source = write_activation(spec.activation, gated=spec.gated)
    hidden, inner, products = spec.hidden, spec.intermediate, 2 if spec.gated else 1
    schemes = spec.schemes
    packed = describe(schemes.first, inner, hidden) if schemes else None
    down_packed = describe(schemes.second, hidden, inner) if schemes else None
    rows = inner if spec.split else spec.rows
    baked: dict[str, Any] = {
        "HIDDEN": spec.hidden,
        "INTERMEDIATE": spec.intermediate,
        "EXPERTS": spec.experts,
        "GATED": spec.gated,
        "INTERLEAVED": spec.interleaved,
        "SPLIT": spec.split,
        "TRANSPOSED": spec.transposed,
        "DOWN_TRANSPOSED": spec.down_transposed,
        "PACKED": packed,
        "DOWN_PACKED": down_packed,
        "MATRIX": packed.bytes if packed else rows * hidden,
        "DOWN_MATRIX": down_packed.bytes if down_packed else hidden * inner,
        "CHOICES": CHOICES,
        "ACTIVATION": load_activation(source),
        "BLOCK_E": max(power_of_two(spec.experts), 32),
        "GATHERED": gpu.gathers,
        # Warps that only store have 168 registers: too few for biases of gates and ups. Halves of
        # transposed weights come through registers, which takes warps that are not there.
        "SPECIALIZED": gpu.tensor_memory and not (spec.bias or spec.learned or spec.transposed),
        "DOWN_SPECIALIZED": gpu.tensor_memory,
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
        blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "SWAPPED": tile.swapped}
        launch = bake(import_kernel(name), tile.num_warps, tile.num_stages, **blocks)
        return replace(launch, max_registers=tile.max_registers)

    def bake_persistent() -> GroupedLaunches:
        first = persistent_tile(gpu, inner, hidden, products)
        second = persistent_tile(gpu, hidden, inner, 1)
        gate_up, down = persistent_blocks(spec, gpu, first, second)
        return replace(
            grouped[PERSISTENT_M],
            gate_up=replace(bake_tile("persistent_gate_up", first), descriptors=gate_up),
            down=replace(bake_tile("persistent_down", second), descriptors=down),
        )

    def bake_routing(name: str, module: str, num_warps: int, **blocks: int) -> Launch:
        return bake(import_kernel(name, module), num_warps, BLOCK=ROUTE_CHUNK, **blocks)

    first = decode_tile(inner, hidden, spec.transposed, schemes and schemes.first)
    second = decode_tile(hidden, inner, spec.down_transposed, schemes and schemes.second)
    grouped = {
        m: GroupedLaunches(
            route=bake_routing("route", "routing", 8, BLOCK_M=m),
            place_chunks=bake_routing("place_chunks", "routing_chunked", 8, BLOCK_M=m),
            gate_up=bake_tile(
                "grouped_gate_up", grouped_tile(spec, gpu, m, inner, hidden, products)
            ),
            down=bake_tile("grouped_down", grouped_tile(spec, gpu, m, hidden, inner, 1)),
        )
        for m in block_ms(spec)
    }
    return Launches(
        spec=spec,
        gpu=gpu,
        activation=source,
        decode_gate_up=bake_tile("decode_gate_up", first),
        decode_down=bake_tile("decode_down", second),
        count_experts=bake_routing("count_experts", "routing_chunked", 4),
        scan_chunks=bake(import_kernel("scan_chunks", "routing_chunked"), BLOCK=SCAN_BLOCK),
        reduce_terms=bake(reduce_terms, BLOCK=min(REDUCE_BLOCK, power_of_two(hidden))),
        grouped=grouped,
        persistent=bake_persistent() if can_persist(spec, gpu) else None,
    )

"""Estimate what a layer costs on a GPU, as an expression of the token count T, and choose by it.

    cost = launches * LAUNCH + sum over both products of
           bytes of the chosen experts / bandwidth + waves * time of a tile

A wave is a tile on every SM; the last one counts in full. A tile takes its reads from L2 and its
products, one after the other; in a persistent kernel, which reads for a next tile while it
multiplies, all but the first tile take the longer of both. Tiles are an expectation: a token
chooses K of E experts, all sets as likely as any, so an expert's rows are binomially distributed,
Binomial(T, K / E). Those that fit one tile make one; of more, the last tile of an expert is half
full.

Rates are data sheets', so costs compare plans and do not predict times. Nothing here is tuned, and
nothing needs triton or tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import sympy as _sympy  # pyright: ignore[reportMissingTypeStubs]
import torch

from moecc.codegen.gpus import Gpu
from moecc.codegen.spec import KernelSpec
from moecc.codegen.triton_tiles import (
    PERSISTENT_M,
    Tile,
    block_ms,
    can_persist,
    decode_tile,
    grouped_tile,
    persistent_tile,
)
from moecc.runtime.schemes.scheme import Scheme

sympy: Any = _sympy  # whose own types are partial
T = sympy.Symbol("T", positive=True, integer=True)
LAUNCH = 3e-6
"""Seconds between kernels of which one needs the other: to drain the GPU and to fill it again."""
L2_OVER_MEMORY = 2
"""How much faster L2 is read than memory: more or less on boards, which no data sheet says."""
ROUTE_CHUNK = 256
"""Assignments ranked at a time; each is compared with all, 256 comparisons a thread."""
MAX_ROUTE = 8 * ROUTE_CHUNK
"""Up to here one program sorts the assignments; above, a program per chunk and three launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to run a spec on some GPU for some K."""

    block_m: int | None
    """Height of the grouped kernels' tiles; None: the decode kernels."""
    persistent: bool = False
    """Products have a program on each SM for all tiles, instead of one for each tile."""
    expression: Any
    """Seconds over `T`, a sympy expression."""
    seconds: Callable[[int], float]
    """The same, compiled."""

    @property
    def text(self) -> str:
        """Print the expression with three digits."""
        return str(sympy.N(self.expression, 3))

    def __str__(self) -> str:
        if self.block_m is None:
            return "decode"
        return f"{'persistent' if self.persistent else 'grouped'}, {self.block_m} rows a tile"


def expected_experts(tokens: Any, active: int, experts: int) -> Any:
    """Expect the number of experts that some tokens choose: E * P(an expert has a row)."""
    return experts * (1 - (1 - min(active / experts, 1.0)) ** tokens)


def expected_tiles(tokens: Any, active: int, experts: int, block_m: int) -> Any:
    """Expect the number of tiles of `block_m` rows."""
    chosen = expected_experts(tokens, active, experts)
    return sympy.Max(chosen, tokens * active / block_m + chosen / 2)


@cache
def plans(spec: KernelSpec, gpu: Gpu, active: int) -> tuple[Plan, ...]:
    """List the ways to run a spec, each with its cost."""
    kinds = [(None, False), *((m, False) for m in block_ms(spec))]
    if can_persist(spec, gpu):
        kinds.append((PERSISTENT_M, True))
    return tuple(_plan(spec, gpu, active, *kind) for kind in kinds)


@lru_cache(maxsize=4096)
def choose_plan(
    spec: KernelSpec, gpu: Gpu, tokens: int, active: int, *, aligned: bool = True
) -> Plan:
    """Choose the plan of least cost; of equal ones the first, which has the least to compute.

    Persistent kernels read tensors that are aligned to 16 bytes.
    """
    possible = [plan for plan in plans(spec, gpu, active) if aligned or not plan.persistent]
    return min(possible, key=lambda plan: plan.seconds(tokens))


def _plan(spec: KernelSpec, gpu: Gpu, active: int, block_m: int | None, persistent: bool) -> Plan:
    if block_m is None:
        launches, tiles = 2, T * active
    else:
        launches = sympy.Piecewise((4, T * active <= MAX_ROUTE), (6, True))
        tiles = expected_tiles(T, active, spec.experts, block_m)
    cost = launches * LAUNCH + sum(
        _product_cost(spec, gpu, active, tile, sizes, tiles, persistent)
        for tile, sizes in _products(spec, gpu, block_m, persistent)
    )
    seconds = sympy.lambdify(T, cost, "math")
    return Plan(block_m=block_m, persistent=persistent, expression=cost, seconds=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """One product: columns of the result, depth, matrices with that shape, bytes of a weight."""

    columns: int
    depth: int
    matrices: int
    width: float


def _products(
    spec: KernelSpec, gpu: Gpu, block_m: int | None, persistent: bool
) -> list[tuple[Tile, _Sizes]]:
    schemes = spec.schemes
    first, second = (schemes.first, schemes.second) if schemes else (None, None)
    found: list[tuple[Tile, _Sizes]] = []
    for columns, depth, matrices, transposed, scheme in (
        (spec.intermediate, spec.hidden, 2 if spec.gated else 1, spec.transposed, first),
        (spec.hidden, spec.intermediate, 1, spec.down_transposed, second),
    ):
        if block_m is None:
            tile = decode_tile(columns, depth, transposed, scheme)
        elif persistent:
            tile = persistent_tile(gpu, columns, depth, matrices)
        else:
            tile = grouped_tile(spec, gpu, block_m, columns, depth, matrices)
        width = _bytes(spec, scheme)
        found.append((tile, _Sizes(columns=columns, depth=depth, matrices=matrices, width=width)))
    return found


def _bytes(spec: KernelSpec, scheme: Scheme | None) -> float:
    return spec.dtype.itemsize if scheme is None else scheme.bits_per_weight / 8


def _product_cost(
    spec: KernelSpec,
    gpu: Gpu,
    active: int,
    tile: Tile,
    sizes: _Sizes,
    tiles: Any,
    persistent: bool,
) -> Any:
    matrix = sizes.columns * sizes.depth * sizes.matrices * sizes.width
    memory = expected_experts(T, active, spec.experts) * matrix / gpu.bandwidth
    weights = tile.n * sizes.matrices * sizes.width
    reads = (tile.m * spec.dtype.itemsize + weights) * sizes.depth
    flops = 2 * tile.m * tile.n * sizes.matrices * sizes.depth
    slow = tile.m == 1 or spec.dtype == torch.float32
    rate = gpu.float32_rate if slow else gpu.product_rate
    both = reads / (L2_OVER_MEMORY * gpu.bandwidth), flops / rate
    waves = sympy.ceiling(tiles * -(-sizes.columns // tile.n) / gpu.sms)
    seconds = sum(both) + (waves - 1) * (max(both) if persistent else sum(both))
    return memory + seconds * gpu.sms

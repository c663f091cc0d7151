"""Write the experts kernel in Triton, for CUDA devices.

Two algorithms, chosen per call from T and K by their cost (`triton_costs`):

    decode     decode_gate_up -> decode_down
               few tokens: bound by reading weights, one row at a time
    grouped    route -> grouped_gate_up -> grouped_down -> reduce_terms
               rows sorted by expert, tensor cores
    persistent route -> persistent_gate_up -> persistent_down -> reduce_terms
               the same for many tiles: a program for each SM, copies by tensor descriptor

The kernels are ordinary files in `codegen/kernels`; `triton_launches` says what is baked into them.
T and K are not: a call compiles at most once per tile height.

No call waits for the device, so all can be captured in a CUDA graph. Results do not depend on which
other tokens share the batch, except for the last bits: the algorithms, and tiles of different
height, add in different orders. Importing this module does not import triton.
"""

import inspect
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from moecc.codegen.gpus import Gpu, gpu_of
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.codegen.triton_costs import MAX_ROUTE, ROUTE_CHUNK, Plan, choose_plan
from moecc.codegen.triton_descriptors import ALIGNMENT, are_aligned, view_weights
from moecc.codegen.triton_inputs import Inputs, check_inputs
from moecc.codegen.triton_launches import CHOICES, Launches, plan_launches
from moecc.codegen.triton_tiles import power_of_two
from moecc.runtime.errors import InputError, UnsupportedSpec
from moecc.runtime.shared import add_shared

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def run_decode(launches: Launches, x: Inputs, out: torch.Tensor) -> None:
    """Run the decode kernels."""
    spec, (tokens, active) = launches.spec, x.ids.shape
    inner = x.hidden.new_empty(tokens * active, spec.intermediate, dtype=spec.dtype)
    first, second = launches.decode_gate_up, launches.decode_down
    grid = (_blocks(spec.intermediate, first.constants["BLOCK_N"]), tokens * active)
    tensors = (x.gate_up, x.up, x.gate_up_bias, x.learned, x.slots, inner)
    first(grid, x.hidden, x.ids, *tensors, active, MATRIX=x.gate_up.stride(0))
    grid = (_blocks(spec.hidden, second.constants["BLOCK_N"]), tokens)
    tensors = (inner, x.ids, x.weights, x.down, x.down_bias, x.slots, x.shared, x.shared_scale, out)
    second(grid, *tensors, active, DOWN_MATRIX=x.down.stride(0), **_choices(active))


def _choices(active: int) -> dict[str, int]:
    return {"CHOICES": power_of_two(active)} if active > CHOICES else {}


def bound_tiles(assignments: int, experts: int, block_m: int) -> int:
    """Bound the number of row tiles without asking the device: an expert adds one partial tile."""
    return _blocks(assignments, block_m) + min(assignments, experts)


def run_routing(
    launches: Launches, ids: torch.Tensor, block_m: int, slots: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the assignments; returns `order` and `tiles` as `kernels/routing.py` defines them."""
    spec, grouped, assignments = launches.spec, launches.grouped[block_m], ids.numel()
    num_tiles = bound_tiles(assignments, spec.experts, block_m)
    order = ids.new_empty(assignments, dtype=torch.int32)
    tiles = ids.new_empty(num_tiles, 3, dtype=torch.int32)
    if assignments <= MAX_ROUTE:
        grouped.route((1,), ids, slots, order, tiles, assignments, num_tiles)
        return order, tiles
    chunks = _blocks(assignments, ROUTE_CHUNK)
    counts = ids.new_empty(spec.experts, chunks, dtype=torch.int32)
    totals = ids.new_empty(spec.experts, dtype=torch.int32)
    launches.count_experts((chunks,), ids, slots, counts, assignments)
    launches.scan_chunks((spec.experts,), counts, totals, chunks)
    tensors = (ids, slots, counts, totals, order, tiles)
    grouped.place_chunks((chunks + 1,), *tensors, assignments, num_tiles)
    return order, tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """What both products of a call share: the sorted rows, and where results go."""

    order: torch.Tensor
    tiles: torch.Tensor
    inner: torch.Tensor
    terms: torch.Tensor


def run_grouped(
    launches: Launches, x: Inputs, out: torch.Tensor, block_m: int, *, persistent: bool = False
) -> None:
    """Run the grouped kernels with tiles of `block_m` rows, or the persistent ones."""
    spec, (tokens, active) = launches.spec, x.ids.shape
    order, tiles = run_routing(launches, x.ids, block_m, x.slots)
    rows = Sorted(
        order=order,
        tiles=tiles,
        inner=x.hidden.new_empty(tokens * active, spec.intermediate, dtype=spec.dtype),
        terms=x.hidden.new_empty(tokens * active, spec.hidden, dtype=spec.dtype),
    )
    if persistent:
        run_persistent_products(launches, x, rows)
    else:
        run_grouped_products(launches, x, rows, block_m)
    grid = (tokens, _blocks(spec.hidden, launches.reduce_terms.constants["BLOCK"]))
    tensors = (rows.terms, x.ids, x.slots, x.shared, x.shared_scale, out)
    launches.reduce_terms(grid, *tensors, active, **_choices(active))


def run_grouped_products(launches: Launches, x: Inputs, rows: Sorted, block_m: int) -> None:
    """Run both products, a program for each tile."""
    spec, grouped, num_tiles = launches.spec, launches.grouped[block_m], len(rows.tiles)
    grid = (num_tiles * _blocks(spec.intermediate, grouped.gate_up.constants["BLOCK_N"]),)
    tensors = (x.hidden, x.gate_up, x.up, x.gate_up_bias, x.learned, x.slots, rows.order)
    sizes = (x.ids.shape[1], num_tiles)
    grouped.gate_up(grid, *tensors, rows.tiles, rows.inner, *sizes, MATRIX=x.gate_up.stride(0))
    grid = (num_tiles * _blocks(spec.hidden, grouped.down.constants["BLOCK_N"]),)
    tensors = (rows.inner, x.down, x.down_bias, x.slots, x.weights, rows.order, rows.tiles)
    grouped.down(grid, *tensors, rows.terms, num_tiles, DOWN_MATRIX=x.down.stride(0))


def run_persistent_products(launches: Launches, x: Inputs, rows: Sorted) -> None:
    """Run both products, a program on each SM."""
    persistent, grid, num_tiles = launches.persistent, (launches.gpu.sms,), len(rows.tiles)
    assert persistent, "run_into refuses the plan"
    gate_up, down = view_weights(launches.spec, x)
    tensors = (x.hidden, gate_up, x.gate_up_bias, x.learned, x.slots, rows.order, rows.tiles)
    persistent.gate_up(grid, *tensors, rows.inner, x.ids.shape[1], num_tiles)
    tensors = (rows.inner, down, x.down_bias, x.slots, x.weights, rows.order, rows.tiles)
    persistent.down(grid, *tensors, rows.terms, num_tiles)


@cache
def _launches_on(gpu: Gpu, spec: KernelSpec) -> Launches:
    return plan_launches(spec, gpu)


def run_into(spec: KernelSpec, plan: Plan | None, x: Inputs, out: torch.Tensor) -> None:
    """Run a plan, or the one that costs least; with slots, out is added onto.

    Raises `InputError` for tensors that do not fit the spec, or not a persistent plan.
    """
    check_inputs(spec, x)
    tokens, active = x.ids.shape
    if tokens * active == 0:
        return
    gpu = gpu_of(out.device)
    launches = _launches_on(gpu, spec)
    aligned = are_aligned(x)
    plan = plan or choose_plan(spec, gpu, tokens, active, aligned=aligned)
    if plan.persistent and not (launches.persistent and aligned):
        raise InputError(
            f"{spec.key!r} on {gpu.name} has no persistent kernels for these tensors: they need "
            "tensor descriptors, half-precision weights, gate and up in one tensor, and rows of a "
            f"multiple of {ALIGNMENT} bytes; pass another plan, or none"
        )
    with torch.cuda.device_of(out):  # Triton launches on the current device
        if plan.block_m is None:
            run_decode(launches, x, out)
        else:
            run_grouped(launches, x, out, plan.block_m, persistent=plan.persistent)


def make_inputs(*tensors: torch.Tensor | None, **others: torch.Tensor | None) -> Inputs:
    """Name the tensors of a call, the small ones contiguous; `others` have their names already."""
    hidden, ids, weights, gate_up, down, gate_up_bias, down_bias, *rest = tensors
    up, learned = (*rest, None, None)[:2]
    small = {
        "hidden": hidden,
        "ids": ids,
        "weights": weights,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
        "learned": learned,
        **others,
    }
    dense: dict[str, Any] = {
        name: None if one is None else one.contiguous() for name, one in small.items()
    }
    assert gate_up is not None
    assert down is not None
    return Inputs(**dense, gate_up=gate_up, down=down, up=up)


def run_experts(
    spec: KernelSpec,
    plan: Plan | None,
    *tensors: torch.Tensor | None,
    shared: torch.Tensor | None = None,
    shared_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the block as `ExpertsFn` says, and `add_shared` to it."""
    x = make_inputs(*tensors, shared=shared, shared_scale=shared_scale)
    if not x.ids.numel():
        return add_shared(torch.zeros_like(x.hidden), shared, shared_scale)
    out = torch.empty_like(x.hidden)
    run_into(spec, plan, x, out)
    return out


def add_experts(
    spec: KernelSpec,
    plan: Plan | None,
    onto: torch.Tensor,
    slots: torch.Tensor,
    *tensors: torch.Tensor | None,
) -> None:
    """Add what the experts in slots give, as `AddExpertsFn` says.

    Raises `InputError` unless `onto` is contiguous float32.
    """
    if onto.dtype != torch.float32 or not onto.is_contiguous():
        raise InputError(
            f"onto is {onto.dtype} with strides {onto.stride()}; it has to be contiguous float32"
        )
    run_into(spec, plan, make_inputs(*tensors, slots=slots.to(onto.device)), onto)


def emit(spec: KernelSpec, plan: Plan | None = None) -> Kernel:
    """Write the kernel of a spec; the first call compiles it. A plan is used for all T and K.

    Raises `UnsupportedSpec` with the reason: not a CUDA device, not a dtype that the kernels know,
    a split that is not one of halves, a scheme that the kernels do not read, or no triton.
    """
    if spec.device != "cuda":
        raise UnsupportedSpec(f"the triton kernels run on cuda devices, not on {spec.device!r}")
    if spec.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UnsupportedSpec(f"the triton kernels take {known} weights, not {spec.dtype}")
    if spec.split and (spec.interleaved or not spec.gated):
        raise UnsupportedSpec("gate and up in two tensors are gated and do not alternate")
    launches = plan_launches(spec)
    kernels = [launch.kernel for launch in launches.every()]
    modules = dict.fromkeys(inspect.getmodule(one.fn) for one in (*launches.helpers(), *kernels))
    source = "\n\n".join(
        [launches.activation, *(inspect.getsource(module) for module in modules if module)]
    )
    run, add = partial(run_experts, spec, plan), partial(add_experts, spec, plan)
    return Kernel(spec=spec, emitter="triton", run=run, add=add, source=source)

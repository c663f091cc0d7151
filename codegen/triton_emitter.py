"""Write the experts kernel in Triton, for CUDA devices.

Two algorithms, chosen per call from T and K by `triton_tiles`:

    decode     decode_gate_up -> decode_down
               few tokens: bound by reading weights, one row at a time
    grouped    route -> grouped_gate_up -> grouped_down -> reduce_terms
               rows sorted by expert, tensor cores

The kernels are ordinary files in `codegen/kernels`; `triton_launches` says what is baked into them.
T and K are not: a call compiles at most once per tile height.

No call waits for the device, so all can be captured in a CUDA graph. Results do not depend on which
other tokens share the batch, except for the last bits: the algorithms, and tiles of different
height, add in different orders. Importing this module does not import triton.
"""

import inspect
from dataclasses import dataclass

import torch

from moecc.codegen.spec import ExpertsFn, Kernel, KernelSpec
from moecc.codegen.triton_launches import ROUTE_CHUNK, Launches, plan_launches
from moecc.codegen.triton_tiles import choose_block_m, prefers_decode
from moecc.runtime.errors import InputError, UnsupportedSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_ROUTE = 8 * ROUTE_CHUNK
"""Up to here one program sorts the assignments; above, a program per chunk and three launches."""


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
    up: torch.Tensor | None


def run_decode(launches: Launches, x: Inputs) -> torch.Tensor:
    """Run the decode kernels."""
    spec, (tokens, active) = launches.spec, x.ids.shape
    inner = x.hidden.new_empty(tokens * active, spec.intermediate, dtype=spec.dtype)
    first, second = launches.decode_gate_up, launches.decode_down
    grid = (_blocks(spec.intermediate, first.constants["BLOCK_N"]), tokens * active)
    first(grid, x.hidden, x.ids, x.gate_up, x.up, x.gate_up_bias, inner, active)
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
    tensors = (x.hidden, x.gate_up, x.up, x.gate_up_bias, order, tiles, inner)
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
    if x.ids.ndim != 2:
        raise InputError(
            f"ids is {tuple(x.ids.shape)}; it needs two dimensions, tokens and experts"
        )
    experts, hidden, inner, rows = spec.experts, spec.hidden, spec.intermediate, spec.rows
    first, second = (inner if spec.split else rows, hidden), (hidden, inner)
    if spec.transposed:
        first = first[::-1]
    if spec.down_transposed:
        second = second[::-1]
    weights = {"gate_up": (x.gate_up, first), "down": (x.down, second)}
    if x.up is not None and spec.split:
        weights["up"] = (x.up, first)
    elif x.up is not None or spec.split:
        raise InputError(
            f"up is {'missing' if spec.split else 'given'}; "
            f"{spec.key!r} has gate and up in {'two tensors' if spec.split else 'one'}"
        )
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
        up: torch.Tensor | None = None,
        learned: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if learned is not None:
            raise InputError("learned was given to a kernel whose activation does not read it")
        x = Inputs(
            hidden=hidden.contiguous(),
            ids=ids.contiguous(),
            weights=weights.contiguous(),
            gate_up=gate_up,
            down=down,
            gate_up_bias=None if gate_up_bias is None else gate_up_bias.contiguous(),
            down_bias=None if down_bias is None else down_bias.contiguous(),
            up=up,
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
    a split that is not one of halves, a learned vector, or no triton.
    """
    if spec.device != "cuda":
        raise UnsupportedSpec(f"the triton kernels run on cuda devices, not on {spec.device!r}")
    if spec.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UnsupportedSpec(f"the triton kernels take {known} weights, not {spec.dtype}")
    if spec.split and (spec.interleaved or not spec.gated):
        raise UnsupportedSpec("gate and up in two tensors are gated and do not alternate")
    if spec.learned:
        raise UnsupportedSpec("the triton kernels' activation reads no vector of an expert's own")
    launches = plan_launches(spec)
    modules = dict.fromkeys(inspect.getmodule(launch.kernel.fn) for launch in launches.every())
    source = "\n\n".join(
        [launches.activation, *(inspect.getsource(module) for module in modules if module)]
    )
    return Kernel(spec=spec, emitter="triton", run=bind(launches), source=source)

"""Say which Triton kernels a model's blocks run on a GPU, and what they use: `moecc kernels`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from moecc.codegen import aot, low_bit
from moecc.codegen.gpus import Gpu, gpu
from moecc.codegen.machine_code import size
from moecc.codegen.router_spec import RouterSpec
from moecc.codegen.spec import KernelSpec
from moecc.codegen.triton_costs import choose_plan, plans
from moecc.codegen.triton_emitter import emit
from moecc.codegen.triton_launches import Launch, plan_launches
from moecc.codegen.triton_router import plan_router
from moecc.inspection import inspect
from moecc.passes.fuse_experts import kernel_spec
from moecc.passes.ir import MoeBlock
from moecc.runtime.errors import ModelError, OptionError
from moecc.runtime.schemes.scheme import SCHEMES, Schemes


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The plan for a number of tokens."""

    tokens: int
    plan: str
    microseconds: float
    """What it costs by data sheets; costs compare plans and predict no times."""
    kernels: tuple[str, ...]
    """In the order of their launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a kernel uses, read from its machine code."""

    kernel: str
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of registers that went to memory."""
    shared: int
    """Bytes of shared memory of a block."""
    warps: int
    """Of a block."""
    blocks: int
    """That an SM runs at a time; 0 where one does not fit."""
    occupancy: float
    """Warps on an SM over those that it can hold."""
    products: str
    """The instruction of tensor cores that it has; empty without one."""
    async_copies: int
    """Instructions that copy to shared memory while others run."""
    loop: int
    """Instructions of the main loop."""
    instructions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPlans:
    """The plans of blocks that share a kernel."""

    blocks: tuple[str, ...]
    spec: str
    active: int
    router: str
    """Its kernel; empty where torch's operators choose."""
    target: str
    board: str
    costs: dict[str, str]
    """Of each plan, seconds over the token count T."""
    chosen: tuple[Chosen, ...]
    resources: tuple[Resources, ...]
    """Of each kernel that is chosen, once."""
    source: str


def explain(
    model: str,
    target: str,
    tokens: Sequence[int],
    quantize: str = "",
    dtype: str = "auto",
    full: bool = False,
    all_layers: bool = False,
    weights: bool = False,
) -> list[KernelPlans]:
    """Plan the kernels of every block of a model for a GPU that need not be there.

    Raises `ModelError` if no MoE block was found, `OptionError` for an unknown target or scheme.
    """
    device = gpu(target)
    if quantize and quantize not in SCHEMES:
        raise OptionError(f"quantize={quantize!r} is not one of {', '.join(SCHEMES)}")
    found: dict[tuple[KernelSpec, int, RouterSpec | None], list[str]] = {}
    seen = inspect(model, "torch", dtype, full, all_layers, weights)
    for record in seen.records:
        for block in record.blocks:
            key = (_spec_on_gpu(block, quantize), block.active, block.router_spec)
            alike = [path for stack in seen.folded for path in stack.alike(block.path)]
            found.setdefault(key, []).extend([block.path, *alike])
    if not found:
        raise ModelError(f"no MoE block was found in {model!r}; moecc why {model} says why")
    return [_plan(*key, device, tokens, paths) for key, paths in found.items()]


def _spec_on_gpu(block: MoeBlock, quantize: str) -> KernelSpec:
    spec = replace(kernel_spec(block), device="cuda")
    if not quantize:
        return spec
    scheme = SCHEMES[quantize]
    return low_bit.packed_kernel(spec, Schemes(first=scheme, second=scheme), "torch").spec


def _plan(
    spec: KernelSpec,
    active: int,
    router: RouterSpec | None,
    device: Gpu,
    tokens: Sequence[int],
    paths: list[str],
) -> KernelPlans:
    launches = plan_launches(spec, device)
    chosen: list[Chosen] = []
    compiled: dict[str, aot.Resources] = {}
    before: list[Launch] = []
    if router is not None:
        before = [plan_router(router)]
        compiled[str(before[0])] = aot.compile_router(router, before[0], device.name)
    for count in tokens:
        plan = choose_plan(spec, device, count, active)
        run = [*before, *launches.of(plan, count * active)]
        for launch in run:
            if str(launch) not in compiled:
                compiled[str(launch)] = aot.compile_kernel(spec, launch, device.name)
        chosen.append(
            Chosen(
                tokens=count,
                plan=str(plan),
                microseconds=plan.seconds(count) * 1e6,
                kernels=tuple(map(str, run)),
            )
        )
    return KernelPlans(
        blocks=tuple(paths),
        spec=spec.key,
        active=active,
        router=router.key if router is not None else "",
        target=device.name,
        board=device.board,
        costs={str(one): one.text for one in plans(spec, device, active)},
        chosen=tuple(chosen),
        resources=tuple(map(_resources, compiled.values())),
        source=emit(spec).source,
    )


def _resources(one: aot.Resources) -> Resources:
    return Resources(
        kernel=one.kernel,
        registers=one.registers,
        spilled=one.spilled,
        shared=one.shared,
        warps=one.warps,
        blocks=one.blocks,
        occupancy=round(one.occupancy, 3),
        products=one.products,
        async_copies=one.async_copies,
        loop=size(one.loop),
        instructions=size(one.instructions),
    )


def _resources_line(one: Resources) -> str:
    products = f", {one.products}" if one.products else ""
    loop = f", {one.loop} in the loop" if one.loop else ""
    return (
        f"  {one.kernel:<28} {one.registers:>3} registers, {one.spilled} B spilled, "
        f"{one.shared / 1024:.0f} KiB shared, {one.blocks} blocks of {one.warps} warps an "
        f"SM ({one.occupancy:.0%}), {one.instructions} instructions{loop}{products}"
    )


def has_problem(found: Sequence[KernelPlans]) -> bool:
    """Tell whether a kernel spills, or does not fit the GPU."""
    return any(row.spilled or not row.blocks for one in found for row in one.resources)


def print_plans(found: Sequence[KernelPlans], console: Console, source: bool = False) -> None:
    """Print plans and costs, what the kernels use, and the source if it is asked for."""
    for one in found:
        path, *others = one.blocks
        more = f" and {len(others)} more" if others else ""
        console.print(f"\n[b]{path or 'the model'}[/b]{more}", highlight=False)
        console.print(f"{one.spec} · K={one.active} · {one.target} ({one.board})", highlight=False)
        console.print(f"  router: {one.router or 'operators of torch'}", highlight=False)
        for name, cost in one.costs.items():
            console.print(f"  {name}: {cost} s", highlight=False, soft_wrap=True)
        for row in one.chosen:
            kernels = ", ".join(row.kernels)
            text = f"  T={row.tokens}: {row.plan}, {row.microseconds:.0f} us: {kernels}"
            console.print(text, highlight=False, soft_wrap=True)
        for row in one.resources:
            console.print(_resources_line(row), highlight=False, soft_wrap=True)
        if source:
            console.print(one.source, highlight=False, markup=False, soft_wrap=True)


def parse_tokens(text: str) -> list[int]:
    """Read a list of token counts such as `1,64,4096`; raises `OptionError` for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise OptionError(f"--tokens {text!r} is not a list of positive numbers such as 1,64,4096")
    return list(map(int, parts))

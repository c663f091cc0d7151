"""Write the kernel of a router in Triton, for CUDA devices: logits to ids and weights."""

import inspect
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

from moecc.codegen.router_spec import RouterKernel, RouterSpec
from moecc.codegen.triton_launches import Launch, import_kernel
from moecc.codegen.triton_tiles import power_of_two
from moecc.runtime.errors import InputError

WARPS = 4


@cache
def plan_router(spec: RouterSpec) -> Launch:
    """Bake a router's kernel; compiles nothing.

    A warp has a token's scores in its registers, or those of a few tokens where experts are few.
    """
    kernel, triton_language = import_kernel("choose_experts"), import_module("triton.language")
    groups, size = power_of_two(spec.groups), power_of_two(spec.experts // spec.groups)
    constants: dict[str, Any] = {
        "EXPERTS": spec.experts,
        "ACTIVE": spec.active,
        "ROUTER": spec,
        "DTYPE": getattr(triton_language, str(spec.dtype).removeprefix("torch.")),
        "ROWS": WARPS * max(1, 32 // (groups * size)),
        "BLOCK_G": groups,
        "BLOCK_S": size,
        "CHOICES": power_of_two(spec.active),
    }
    return Launch(kernel=kernel, constants=constants, num_warps=WARPS, num_stages=1)


def run_router(
    spec: RouterSpec, launch: Launch, logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose as `choose_torch` does; of equal scores the lowest ids.

    Raises `InputError` for tensors of other shapes than the spec's.
    """
    given = (logits.shape[1:], None if bias is None else tuple(bias.shape))
    if given != ((spec.experts,), (spec.experts,) if spec.bias else None):
        wanted = f"logits [T, {spec.experts}] and {'a' if spec.bias else 'no'} bias"
        raise InputError(
            f"logits are {list(logits.shape)}, bias {given[1]}; {spec.key!r} needs {wanted}"
        )
    tokens = len(logits)
    ids = logits.new_empty(tokens, spec.active, dtype=torch.int64)
    weights = logits.new_empty(tokens, spec.active, dtype=spec.weights_dtype)
    if tokens:
        bias = None if bias is None else bias.contiguous()
        grid = (-(-tokens // launch.constants["ROWS"]),)
        with torch.cuda.device_of(logits):
            launch(grid, logits.contiguous(), bias, ids, weights, tokens)
    return ids, weights


def emit(spec: RouterSpec) -> RouterKernel:
    """Write a router's kernel; the first call compiles it.

    Raises `UnsupportedSpec` where triton cannot be imported.
    """
    launch = plan_router(spec)
    module = inspect.getmodule(launch.kernel.fn)
    assert module is not None
    run = partial(run_router, spec, launch)
    return RouterKernel(key=f"triton: {spec.key}", run=run, source=inspect.getsource(module))

"""Run one MoE layer with kt-kernel's CPU kernels in bf16, the widest that this processor has.

PyPI's `kt-kernel` demands torch 2.9.1 and brings packages of other names, but its extension takes
addresses and sizes alone: `pip install --no-deps --target FOLDER kt-kernel`, FOLDER on PYTHONPATH.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

_MOST = 4096
"""Tokens of a call."""


def installed() -> bool:
    """Tell whether it is there."""
    return find_spec("kt_kernel") is not None


def build(
    gate_up: torch.Tensor, down: torch.Tensor, active: int, threads: int
) -> Callable[..., torch.Tensor]:
    """Load weights [E, 2I, H], [E, H, I]; returns `run(hidden, ids, weights)` for <= 4096 tokens.

    The extension lays weights out anew, in memory of its own.
    """
    kernels: Any = import_module("kt_kernel").kt_kernel_ext
    pool = kernels.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    workers = kernels.CPUInfer(pool)
    experts, hidden, intermediate = down.shape
    on_gpu = torch.zeros(experts, dtype=torch.bool)
    config = kernels.moe.MOEConfig(experts, active, hidden, intermediate, on_gpu.data_ptr())
    config.pool, config.layer_idx, config.max_len = workers.backend_, 0, _MOST
    gate, up = gate_up.chunk(2, dim=1)
    config.gate_projs, config.up_projs, config.down_projs = (
        [[expert.data_ptr() for expert in one]] for one in (gate, up, down)
    )
    kind = getattr(kernels.moe, "AMXBF16_MOE", None) or kernels.moe.AVX2BF16_MOE
    layer, order = kind(config), torch.arange(experts)
    workers.submit(layer.load_weights_task(order.data_ptr()))
    workers.sync()

    def run(hidden: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        count, out = torch.tensor([len(hidden)], dtype=torch.int32), torch.empty_like(hidden)
        places = [one.contiguous() for one in (ids, shares.float(), hidden)]
        addresses = [one.data_ptr() for one in (*places, out)]
        workers.submit(layer.forward_task(count.data_ptr(), active, *addresses, False))
        workers.sync()
        return out

    run.keep = on_gpu, workers  # type: ignore[attr-defined]
    return run

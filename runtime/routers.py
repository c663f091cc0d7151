"""Define the operator that a rewritten graph calls for a router.

    moecc::choose_experts  the ids [T, K] and weights [T, K] of each token's experts

Like `moecc::experts` it is opaque to the inner backend.
"""

from collections.abc import Callable

import torch

from moecc.runtime.errors import InputError
from moecc.runtime.ops import calls, define

ChooseFn = Callable[
    [
        torch.Tensor,  # logits  [T, E]
        torch.Tensor | None,  # bias    [E], which only the choice sees
    ],
    tuple[torch.Tensor, torch.Tensor],  # ids [T, K] int64, weights [T, K]
]

_kernels: dict[str, ChooseFn] = {}


def install(key: str, run: ChooseFn) -> None:
    """Make a kernel callable from graphs under its key; equal keys mean equal kernels."""
    _kernels[key] = run


def _run(
    logits: torch.Tensor, bias: torch.Tensor | None, active: int, dtype: torch.dtype, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    run = _kernels.get(kernel)
    if run is None:
        raise InputError(
            f"kernel {kernel!r} is not installed in this process; "
            "graphs have to be compiled by moecc here before they run"
        )
    calls[kernel] += 1
    return run(logits, bias)


def _fake(
    logits: torch.Tensor, bias: torch.Tensor | None, active: int, dtype: torch.dtype, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], active)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=dtype)


define(
    "choose_experts(Tensor logits, Tensor? bias, int active, ScalarType dtype, str kernel) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
)

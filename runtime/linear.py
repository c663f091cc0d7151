"""Define the operator that a rewritten graph calls for a dense layer.

    moecc::linear  y = x W^T (+ b), by the kernel it names

Like `moecc::experts` it is opaque to the inner backend and takes weights as runtime inputs.
"""

from collections.abc import Callable

import torch

from moecc.runtime.errors import InputError
from moecc.runtime.ops import calls, define, refuse_meta

LinearFn = Callable[
    [
        torch.Tensor,  # x       [.., K]
        torch.Tensor,  # weight  [N, K]
        torch.Tensor | None,  # bias    [N]
    ],
    torch.Tensor,  # [.., N], dtype and device of x
]

_kernels: dict[str, LinearFn] = {}


def install(key: str, run: LinearFn) -> None:
    """Make a kernel callable from graphs under its key; equal keys mean equal kernels."""
    _kernels[key] = run


def _run(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    run = _kernels.get(kernel)
    if run is None:
        raise InputError(
            f"kernel {kernel!r} is not installed in this process; "
            "graphs have to be compiled by moecc here before they run"
        )
    refuse_meta(weight)
    calls[kernel] += 1
    return run(x, weight, bias)


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    refuse_meta(weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str kernel) -> Tensor",
    _run,
    _fake,
)

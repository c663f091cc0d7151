"""Define the operators that a rewritten graph calls for dense layers.

    moecc::linear   y = x W^T (+ b), by the kernel it names
    moecc::linears  the same for several layers of one x, in one call

Like `moecc::experts` they are opaque to the inner backend and take weights as runtime inputs.
"""

from collections.abc import Callable, Sequence

import torch

from moecc.runtime.errors import InputError
from moecc.runtime.ops import calls, define, refuse_meta

LinearsFn = Callable[
    [
        torch.Tensor,  # x       [.., K]
        Sequence[torch.Tensor],  # weights  [N, K] each
        Sequence[torch.Tensor | None],  # biases   [N] each
    ],
    list[torch.Tensor],  # [.., N] each, dtype and device of x
]

_kernels: dict[str, LinearsFn] = {}


def install(key: str, run: LinearsFn) -> None:
    """Make a kernel callable from graphs under its key; equal keys mean equal kernels."""
    _kernels[key] = run


def _run_all(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    kernel: str,
) -> list[torch.Tensor]:
    run = _kernels.get(kernel)
    if run is None:
        raise InputError(
            f"kernel {kernel!r} is not installed in this process; "
            "graphs have to be compiled by moecc here before they run"
        )
    for weight in weights:
        refuse_meta(weight)
    calls[kernel] += len(weights)
    return run(x, weights, biases)


def _run(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    return _run_all(x, (weight,), (bias,), kernel)[0]


def _fake_all(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    kernel: str,
) -> list[torch.Tensor]:
    for weight in weights:
        refuse_meta(weight)
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    return _fake_all(x, (weight,), (bias,), kernel)[0]


define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str kernel) -> Tensor",
    _run,
    _fake,
)
define(
    "linears(Tensor x, Tensor[] weights, Tensor?[] biases, str kernel) -> Tensor[]",
    _run_all,
    _fake_all,
)

"""Define the operator that a rewritten graph calls for the attention of few query tokens.

    moecc::attention  softmax(scale q k^T + mask) v, by the kernel it names

Keys and values have a head for each group of query heads, and are read where the cache has them.
"""

from collections.abc import Callable

import torch

from moecc.runtime.errors import InputError
from moecc.runtime.ops import calls, define

AttentionFn = Callable[
    [
        torch.Tensor,  # query  [B, Q, T, D]
        torch.Tensor,  # key    [B, G, S, D]; Q is a multiple of G
        torch.Tensor,  # value  [B, G, S, V]
        torch.Tensor | None,  # mask   what broadcasts to [B, Q, T, S]: bool, or added to scores
        bool,  # causal: token t sees keys 0..t
        float,  # scale
    ],
    torch.Tensor,  # [B, Q, T, V], which lies in memory as [B, T, Q, V]
]
"""A token without any key is 0, as it is in torch."""

_kernels: dict[str, AttentionFn] = {}


def install(key: str, run: AttentionFn) -> None:
    """Make a kernel callable from graphs under its key; equal keys mean equal kernels."""
    _kernels[key] = run


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    kernel: str,
) -> torch.Tensor:
    run = _kernels.get(kernel)
    if run is None:
        raise InputError(
            f"kernel {kernel!r} is not installed in this process; "
            "graphs have to be compiled by moecc here before they run"
        )
    calls[kernel] += 1
    return run(query, key, value, mask, causal, scale)


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    kernel: str,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)


define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, "
    "str kernel) -> Tensor",
    _run,
    _fake,
)

"""Define what `moecc::experts` does with the output of a shared expert."""

import torch


def add_shared(
    out: torch.Tensor, shared: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    """Add shared [T, H] to the routed experts' out [T, H], times scale [T, 1] if given."""
    if shared is None:
        return out
    return out + (shared if scale is None else scale * shared)

"""Compile a small MoE block on each device, and compare it with itself uncompiled."""

from collections.abc import Iterator

import torch
from torch import nn

from moecc.doctor.check import Check, broken, limited, ok
from moecc.records import all_records

_TOLERANCE = 1e-5
"""Relative to the output's norm, in float32."""


class Block(nn.Module):
    """Top-2 of 4 experts, written as in gpt-fast: gathered weights and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 96, 64) / 8)
        self.down = nn.Parameter(torch.randn(4, 64, 48) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [T, 64]."""
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        gate, up = torch.einsum("th,tkih->tki", x, self.up[ids]).chunk(2, -1)
        out = torch.einsum("tki,tkhi->tkh", nn.functional.silu(gate) * up, self.down[ids])
        return (out * weights[..., None]).sum(1)


def blocks() -> Iterator[Check]:
    """Check every device that kernels may run on."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        yield _block(device)


def _block(device: str) -> Check:
    name = f"MoE block on {device}"
    fix = "set MOECC_LOG=all and report what it says, with the output of moecc doctor"
    torch.compiler.reset()
    model, x = Block().eval().to(device), torch.randn(7, 64, device=device)
    try:
        with torch.no_grad():
            wanted = model(x)
            got = torch.compile(model, backend="moecc", options={"inner": "eager"})(x)
    except Exception as error:  # whatever does not work here
        return broken(name, f"{type(error).__name__}: {str(error).splitlines()[0]}", fix)
    record = all_records()[-1]
    if not record.blocks:
        return broken(name, f"it was not found: {[miss.why for miss in record.misses]}", fix)
    difference = float((got - wanted).norm() / wanted.norm())
    if not difference < _TOLERANCE:
        return broken(name, f"its output is off by {difference:.1e} of its norm", fix)
    kernel = record.lowerings[0].kernel
    declined = [miss.why for miss in record.misses if miss.fallback]
    if declined:
        return limited(name, f"{kernel}; {'; '.join(declined)}", "see the compiler's line")
    return ok(name, f"{kernel}, off by {difference:.0e} of its norm")

"""Say everything an emitter has to know to write the kernel of one MoE block.

Shape letters, used in all of moecc: T tokens, H hidden size, I intermediate size, E experts,
K active experts a token. T and K are arguments of the kernel, never baked.
"""

from dataclasses import dataclass

import torch

from moecc.codegen.activation import Expr
from moecc.runtime.ops import AddExpertsFn, ExpertsFn
from moecc.runtime.schemes.scheme import Schemes


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """The experts of one MoE block as a kernel sees them. Equal specs share one kernel."""

    hidden: int
    """H."""
    intermediate: int
    """I: the width after the activation."""
    experts: int
    """E."""
    dtype: torch.dtype
    """Of expert weights, biases and result; accumulation is float32 (float64 for float64)."""
    activation: Expr
    gated: bool
    """The first product has 2I outputs, half of them gates."""
    interleaved: bool
    """Gates and ups alternate (GPT-OSS) instead of lying in two halves."""
    transposed: bool
    """The first product's weights are stored input-major: [E, H, 2I], or two [E, H, I]."""
    down_transposed: bool
    """The second product's weights are stored input-major: [E, I, H]."""
    bias: bool
    """Both products have a bias."""
    split: bool = False
    """Gate and up are two tensors of I rows each instead of one of 2I."""
    schemes: Schemes | None = None
    """Weights are packed codes, uint8 [E, bytes] (`moecc.runtime.schemes.packing`), output-major;
    gate and up are split."""
    device: str
    """A torch device type: cpu, cuda."""

    @property
    def rows(self) -> int:
        """Outputs of the first product: 2I when gated, else I."""
        return 2 * self.intermediate if self.gated else self.intermediate

    @property
    def learned(self) -> bool:
        """The activation reads a vector [I] of each expert's own."""
        return "learned" in self.activation.leaves()

    @property
    def key(self) -> str:
        """A stable name: the kernel's identity in graphs, reports and caches."""
        names = ("interleaved", "transposed", "down_transposed", "bias", "split")
        flags = [name for name in names if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"E{self.experts} H{self.hidden} I{self.intermediate}"
        scheme = [str(self.schemes)] if self.schemes else []
        return " ".join([str(self.activation), dtype, *scheme, shape, *flags, self.device])


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What an emitter made of a spec."""

    spec: KernelSpec
    emitter: str
    """`triton`, `native` or `torch`."""
    run: ExpertsFn
    add: AddExpertsFn | None = None
    """The same for some experts at a time; None where the emitter has no such kernel."""
    source: str
    """The emitted code as text, for `moecc passes --dump` and MOECC_DUMP."""

    @property
    def key(self) -> str:
        """Name the kernel in a graph: `native: mul(silu(gate), up) float32 E8 H64 I48 cpu`."""
        return f"{self.emitter}: {self.spec.key}"

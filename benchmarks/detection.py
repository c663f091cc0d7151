"""Time the passes over deep models, and how the time grows with the number of layers.

    python -m benchmarks.detection --layers 12,24,48

Each model is a stack of MoE blocks written in one style. What is timed are moecc's passes alone, of
which `detect_moe` looks at every node; Dynamo's tracing comes before them, inductor after.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import machine, table
from moecc.records import all_records

HIDDEN, INNER, EXPERTS, ACTIVE = 64, 48, 8, 2


class Block(nn.Module):
    """A residual block with a router; what follows is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.first = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 8)
        self.second = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Route and add."""
        weights, ids = self.router(x).softmax(-1).topk(ACTIVE)
        return x + self.experts(x, ids, weights)

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute the chosen experts' weighted sum [T, H]."""
        raise NotImplementedError


class Gathered(Block):
    """Weights of the chosen experts are gathered."""

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Block`."""
        rows = F.gelu(torch.einsum("th,tkhi->tki", x, self.first[ids]))
        return torch.einsum("tki,tkih,tk->th", rows, self.second[ids], weights)


class Dense(Block):
    """All experts on all tokens, gates zero for those that were not chosen."""

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Block`."""
        gates = x.new_zeros(len(x), EXPERTS).scatter(1, ids, weights)
        rows = F.gelu(torch.einsum("th,ehi->tei", x, self.first))
        return (torch.einsum("tei,eih->teh", rows, self.second) * gates.unsqueeze(-1)).sum(1)


class Looped(Block):
    """A loop over experts, each on its tokens."""

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Block`."""
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, slot = torch.where(ids == expert)
            rows = F.gelu(x[token] @ self.first[expert]) @ self.second[expert]
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out


class Capacity(Block):
    """Buffers of a fixed size for each expert; tokens beyond it are dropped."""

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Block`."""
        size = 6
        chosen = F.one_hot(ids.T.reshape(-1), EXPERTS)  # first choices of all tokens come first
        place = (chosen.cumsum(0) - 1).mul(chosen).sum(-1)
        slots = chosen.mul(place.unsqueeze(-1) < size).unsqueeze(-1)
        slots = slots * (place[:, None, None] == torch.arange(size))
        slots = slots.view(ACTIVE, len(x), EXPERTS, size)
        combine = (slots * weights.T[:, :, None, None]).sum(0)
        buffers = torch.einsum("tec,th->ech", slots.sum(0).to(x.dtype), x)
        outputs = torch.bmm(F.gelu(torch.bmm(buffers, self.first)), self.second)
        return torch.einsum("tec,ech->th", combine, outputs)


STYLES = (Gathered, Dense, Looped, Capacity)


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", default="12,24,48")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    arguments = parser.parse_args()
    print(machine())
    counts = [int(one) for one in arguments.layers.split(",")]
    rows = [["", *(f"{count} layers" for count in counts), "blocks"]]
    for style in STYLES:
        measured = [measure(style, count, arguments.rounds) for count in counts]
        rows.append([style.__name__.lower(), *(f"{ms:.0f} ms" for ms, _ in measured)])
        rows[-1].append("/".join(str(blocks) for _, blocks in measured))
    print(table(rows))


def measure(style: type[Block], layers: int, rounds: int) -> tuple[float, int]:
    """Compile a stack; give the milliseconds of moecc's passes and the number of blocks."""
    model = nn.Sequential(*(style() for _ in range(layers))).eval()
    options = {"inner": "eager", "kernels": "torch"}
    taken: list[float] = []
    for _ in range(rounds):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend="moecc", options=options)(torch.randn(32, HIDDEN))
        taken.append(sum(step.milliseconds for step in all_records()[-1].steps))
    return min(taken), len(all_records()[-1].blocks)


if __name__ == "__main__":
    main()

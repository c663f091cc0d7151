"""Say everything a kernel has to know to choose a token's experts, and define what it computes.

scores = function(logits)
choice = groups(scores + bias)                       only the choice sees bias and groups
ids    = the K best of choice
weights = function(scores[ids]) / max(sum + epsilon, floor) * scale
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from moecc.runtime.routers import ChooseFn

Function = Callable[[torch.Tensor], torch.Tensor]
FUNCTIONS: Mapping[str, Function] = {
    "": lambda x: x,
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt-softplus": lambda x: functional.softplus(x).sqrt(),
}
"""What may become of logits, and of the chosen scores: functions of float32 values [.., n]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """The router of one MoE block after its matrix. Equal specs share one kernel."""

    experts: int
    """E."""
    active: int
    """K."""
    scores: str = ""
    """Of `FUNCTIONS`, over the logits of all experts."""
    dtype: torch.dtype = torch.float32
    """What the scores are rounded to, step by step, before the choice."""
    bias: bool = False
    """The choice goes by scores plus a value for each expert."""
    groups: int = 1
    """Of neighbouring experts, E / groups each."""
    kept: int = 1
    """Groups that experts are chosen from; the scores of the others become `fill`."""
    best: int = 1
    """A group's score is the sum of so many of its best."""
    fill: float = float("-inf")
    weigh: str = ""
    """Of `FUNCTIONS`, over the scores of the K chosen ones."""
    normalised: bool = False
    """Weights are divided by their sum + epsilon, or by `floor` where that is less."""
    epsilon: float = 0.0
    floor: float = 0.0
    """None if 0."""
    scale: float = 1.0
    weights_dtype: torch.dtype = torch.float32
    """Of the weights; from the choice on they are computed in float32 and rounded once."""

    @property
    def key(self) -> str:
        """A stable name: `sigmoid + bias, 4 of 8 groups by 2, top-8 of 256, / (sum + 1e-20)`."""
        parts = [f"{self.scores or 'logits'}{' + bias' * self.bias}"]
        if self.kept < self.groups:
            fill = f" else {self.fill:g}"
            parts.append(f"{self.kept} of {self.groups} groups by {self.best}{fill}")
        parts.append(f"top-{self.active} of {self.experts}")
        if self.weigh:
            parts.append(self.weigh)
        if self.normalised:
            floor = f", at least {self.floor:g}" if self.floor else ""
            parts.append(f"/ (sum + {self.epsilon:g}{floor})")
        if self.scale != 1:
            parts.append(f"* {self.scale!r}")
        dtypes = [str(one).removeprefix("torch.") for one in (self.dtype, self.weights_dtype)]
        return f"{', '.join(parts)} {' '.join(dtypes)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterKernel:
    """What an emitter made of a spec."""

    key: str
    """Its name in graphs and reports."""
    run: ChooseFn
    source: str
    """The emitted code as text."""


def choose_torch(
    spec: RouterSpec, logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give ids [T, K] int64 and weights [T, K] from logits [T, E] and a bias [E].

    Of equal scores any may be chosen, as `torch.topk` does.
    """
    scores = _rounded(spec, FUNCTIONS[spec.scores](logits.float()))
    choice = scores if bias is None else _rounded(spec, scores + bias.float())
    if spec.kept < spec.groups:
        by_group = choice.view(len(choice), spec.groups, -1)
        best = _rounded(spec, by_group.topk(spec.best).values.sum(-1))
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept = kept.scatter(1, best.topk(spec.kept).indices, True).unsqueeze(-1)
        choice = by_group.masked_fill(~kept, spec.fill).view_as(choice)
    ids = choice.topk(spec.active).indices
    weights = FUNCTIONS[spec.weigh](scores.gather(1, ids))
    if spec.normalised:
        total = weights.sum(-1, keepdim=True) + spec.epsilon
        weights = weights / (total.clamp(min=spec.floor) if spec.floor else total)
    return ids, (weights * spec.scale).to(spec.weights_dtype)


def _rounded(spec: RouterSpec, scores: torch.Tensor) -> torch.Tensor:
    return scores.to(spec.dtype).float()

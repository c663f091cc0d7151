"""Decide which drafted tokens stay, so that the text is the model's own.

Greedily, a drafted token stays while it is the one that the model would have chosen. With sampling,
token x stays with probability min(1, p(x) / q(x)), p by the model and q by the draft; the first
that does not is replaced by a sample of max(0, p - q), and the tokens have the model's distribution
(Leviathan et al., arXiv 2211.17192, algorithm 1). A draft that names one token without saying how
sure it is has q(x) = 1.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a draft gives."""

    tokens: torch.Tensor
    """[k] int64."""
    probabilities: torch.Tensor | None = None
    """[k, V], what each token was sampled from; None: the draft is sure."""


def choose(scores: torch.Tensor, sample: bool) -> torch.Tensor:
    """Choose a token [1] by processed scores [V]."""
    if not sample:
        return scores.argmax().unsqueeze(0)
    return torch.multinomial(scores.softmax(-1), 1)


def accept(proposal: Proposal, scores: torch.Tensor, sample: bool) -> torch.Tensor:
    """Give the new tokens [1..k+1]: those that stay, and the model's next one.

    `scores` [k + 1, V] are the model's, processed, after the token before the draft and after each
    drafted one.
    """
    drafted = proposal.tokens
    if not sample:
        chosen = scores.argmax(-1)
        return chosen[: _leading(chosen[:-1] == drafted) + 1]
    target = scores.softmax(-1)
    places = torch.arange(len(drafted), device=drafted.device)
    right = target[places, drafted]
    if proposal.probabilities is not None:
        right = right / proposal.probabilities[places, drafted]
    stay = _leading(torch.rand(len(drafted), device=drafted.device) < right)
    last = target[stay]
    if stay < len(drafted):
        last = _without(last, proposal, stay)
    return torch.cat((drafted[:stay], torch.multinomial(last, 1)))


def _without(target: torch.Tensor, proposal: Proposal, place: int) -> torch.Tensor:
    """Give max(0, p - q) [V]; it is p where that is nothing but rounding."""
    if proposal.probabilities is None:
        rest = target.clone()
        rest[proposal.tokens[place]] = 0
    else:
        rest = (target - proposal.probabilities[place]).clamp(min=0)
    return rest if rest.sum() > 0 else target


def _leading(right: torch.Tensor) -> int:
    """Count the values before the first that is false."""
    return int(right.long().cumprod(0).sum())

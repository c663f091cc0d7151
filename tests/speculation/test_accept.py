"""Which drafted tokens stay: those that the model would have written, or would as often."""

from collections import Counter
from typing import cast

import pytest
import torch

from moecc.speculation.accept import Proposal, accept

TOKENS = 5


def one_hot(*tokens: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), TOKENS).float()


@pytest.mark.parametrize(
    ("drafted", "expected"),
    [([], [3]), ([3, 1], [3, 1, 4]), ([3, 2], [3, 1]), ([0, 1], [3])],
)
def test_greedily_they_stay_up_to_the_first_that_is_wrong(
    drafted: list[int], expected: list[int]
) -> None:
    scores = one_hot(3, 1, 4)[: len(drafted) + 1]
    proposal = Proposal(tokens=torch.tensor(drafted, dtype=torch.int64))
    assert accept(proposal, scores, sample=False).tolist() == expected


@pytest.mark.parametrize("sure", [True, False])
def test_samples_have_the_distribution_of_the_model(sure: bool) -> None:
    """Of the first token, and of the second after each first: chi-square, 1 chance in 1000.

    The draft's distributions are others than the model's, and rule one token out.
    """
    torch.manual_seed(0)
    runs = 4000
    model = torch.randn(TOKENS + 1, TOKENS).softmax(-1)  # by the token before; the last: none
    draft = torch.randn(TOKENS + 1, TOKENS).softmax(-1)
    draft[:, 2] = 0
    draft /= draft.sum(-1, keepdim=True)
    first = torch.multinomial(draft[TOKENS], runs, replacement=True)
    second = torch.multinomial(draft[first], 1)[:, 0]
    firsts, pairs = Counter[int](), Counter[tuple[int, int]]()
    for one, two in torch.stack((first, second), dim=1):
        proposal = Proposal(
            tokens=torch.stack((one, two)),
            probabilities=None if sure else draft[[TOKENS, int(one)]],
        )
        scores = model[[TOKENS, int(one), int(two)]].log()
        tokens = cast(list[int], accept(proposal, scores, sample=True).tolist())
        firsts[tokens[0]] += 1
        if len(tokens) > 1:
            pairs[tokens[0], tokens[1]] += 1
    assert chi_square([firsts[token] for token in range(TOKENS)], model[TOKENS]) < 18.5  # 4 free
    for one in range(TOKENS):
        counts = [pairs[one, token] for token in range(TOKENS)]
        if sum(counts) > 100:
            assert chi_square(counts, model[one]) < 18.5


def chi_square(counts: list[int], shares: torch.Tensor) -> float:
    expected = shares * sum(counts)
    return float(((torch.tensor(counts) - expected) ** 2 / expected).sum())

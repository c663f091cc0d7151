"""Remember which experts a block chose for a token, to guess what it chooses for it next time.

The first block's experts cannot be guessed from an earlier residual stream: there is none. But its
choice depends on little beside the token itself. On the shipped model's text three in four of a
token's experts are those of its last occurrence, where the block's router on the embeddings names
one in three.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import cast

import torch

MOST = 1 << 16
"""Tokens that are remembered: about 20 MB of K = 8 in Python's numbers."""


@dataclass(slots=True)
class TokenMemory:
    """The experts of each token's last occurrence, best first."""

    _experts: dict[int, Sequence[int]] = field(default_factory=dict[int, Sequence[int]])
    """The latest learned last."""
    _tokens: Sequence[int] = ()
    """Of the pass under way, until the block has chosen."""

    def recall(self, tokens: Sequence[int]) -> list[int]:
        """Begin a pass of these tokens; give the experts that they chose before, best first."""
        self._tokens = tokens
        known = [self._experts[token] for token in tokens if token in self._experts]
        ranked = chain.from_iterable(zip_longest(*known))
        return [expert for expert in dict.fromkeys(ranked) if expert is not None]

    def learn(self, ids: torch.Tensor) -> None:
        """Remember what the tokens of this pass chose: `ids` [T, K]."""
        tokens, self._tokens = self._tokens, ()
        if len(tokens) != len(ids):
            return
        for token, chosen in zip(tokens, cast(list[list[int]], ids.tolist()), strict=True):
            self._experts.pop(token, None)
            self._experts[token] = chosen
        while len(self._experts) > MOST:
            del self._experts[next(iter(self._experts))]

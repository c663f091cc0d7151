"""Choose how many tokens to draft, from what drafts and their verification have taken so far.

A cycle drafts k tokens and verifies them in one pass over k + 1. It gives the drafted tokens up to
the first that is refused, and one more:

    rate(k) = (1 + sum over i <= k of p_1 .. p_i) / (k * draft + verify(k + 1))

with p_i the chance of the i-th drafted token where those before it were accepted, and times in
seconds: MoE-SpeQ's amortization roofline (arXiv 2511.14102, section 2.2 of its model) with k = 0,
which is plain decoding, among its arms. Times are those of whole passes as they were measured, so
that cold experts, a busy link and what reads cost the cores are in them.

Everything is estimated while it runs. What other depths would give is only known if they are tried
now and then. A trial costs the time that it takes beyond what its tokens are worth at the present
rate, and is made when a small share of the time since the last one pays for it, so that being wrong
costs no more than that share. So it is with the first ones, of which the worst is expected.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST = 8
"""Tokens of a draft, unless the caller says more."""
SHARE = 0.02
"""Of the time, for trials."""
_STAY = 1.03
"""Another depth has to be so many times better: estimates wobble."""
_WEIGHT = 0.15
"""Of a new observation: about the last seven count."""
_HOPEFUL = 0.7
"""The chance of a drafted token before anything is known."""


def tokens_of(chances: Sequence[float]) -> float:
    """Give the tokens that a cycle is expected to give, of drafted tokens with these chances."""
    reached, tokens = 1.0, 1.0
    for chance in chances:
        reached *= chance
        tokens += reached
    return tokens


def rate(chances: Sequence[float], draft: float, verify: float) -> float:
    """Give tokens a second of drafts as long as `chances`; `draft` is one drafted token's time."""
    return tokens_of(chances) / (len(chances) * draft + verify)


@dataclass(slots=True)
class Depth:
    """What is known of drafts of one source on one model."""

    most: int = MOST
    current: int = 0
    """The depth that seems best."""
    chances: list[float] = field(default_factory=list[float])
    draft: float | None = None
    """Seconds of a drafted token."""
    verify: dict[int, float] = field(default_factory=dict[int, float])
    """Seconds of a pass over so many tokens."""
    _counts: Counter[int] = field(default_factory=Counter[int])
    """Passes over so many tokens, the first among them."""
    credit: float = 0.0
    """Seconds that may go to trials."""
    _trials: int = 0

    def choose(self, limit: int) -> int:
        """Say how many tokens to draft now, no more than `limit`."""
        limit = min(limit, self.most)
        for first in (0, min(1, limit)):  # what every estimate is made of
            if first + 1 not in self.verify:
                return self._first(first)
        best = max(range(limit + 1), key=self.rate)
        current = min(self.current, limit)
        if self.rate(best) > _STAY * self.rate(current):
            current = self.current = best
        return self._trial(current, limit)

    def best_rate(self) -> float:
        """Estimate tokens a second at the best depth above 0; 0 before drafts were timed."""
        if self.draft is None:
            return 0.0
        return max(map(self.rate, range(1, self.most + 1)))

    def observe(self, depth: int, accepted: int, draft: float, verify: float) -> None:
        """Take note of a cycle: drafted tokens, those accepted, and the seconds of both parts."""
        for place in range(min(accepted + 1, depth)):
            if place == len(self.chances):
                self.chances.append(self._chance(place))
            self.chances[place] += _WEIGHT * ((place < accepted) - self.chances[place])
        self._counts[depth + 1] += 1
        if self._counts[depth + 1] == 1:
            return  # the first pass of a size may compile something
        self.verify[depth + 1] = mix(self.verify.get(depth + 1), verify)
        if depth:
            self.draft = mix(self.draft, draft / depth)
        self.credit += SHARE * (draft + verify)

    def rate(self, depth: int) -> float:
        """Estimate tokens a second of drafts this long."""
        chances = [self._chance(place) for place in range(depth)]
        return rate(chances, self.draft or 0.0, self.verify_seconds(depth + 1))

    def table(self) -> list[tuple[int, float, float, float]]:
        """List depth, expected tokens, and seconds of both parts, as far as passes were timed."""
        return [
            (
                depth,
                tokens_of([self._chance(place) for place in range(depth)]),
                depth * (self.draft or 0.0),
                self.verify_seconds(depth + 1),
            )
            for depth in range(self.most + 1)
            if self.verify and (depth == 0 or self.draft is not None)
        ]

    def verify_seconds(self, tokens: int) -> float:
        """Estimate a pass over so many tokens: on the line between the nearest that were seen."""
        if tokens in self.verify:
            return self.verify[tokens]
        known = sorted(self.verify)
        below = [one for one in known if one < tokens][-1:] or known[:1]
        above = [one for one in known if one > tokens][:1]
        if not above:
            above = below
            below = [one for one in known if one < above[0]][:1] or above
        left, right = below[0], above[0]
        if left == right:
            return self.verify[left]
        slope = max(0.0, (self.verify[right] - self.verify[left]) / (right - left))
        return self.verify[left] + slope * (tokens - left)

    def _first(self, depth: int) -> int:
        """Try a depth of which nothing is known once time pays for the worst.

        That is a draft as slow as the model, and wrong, and a pass as long as one for each token.
        """
        cost = 2 * depth * self.verify.get(1, 0.0)
        if cost > self.credit:
            return 0
        self.credit -= cost
        return depth

    def _chance(self, place: int) -> float:
        if place < len(self.chances):
            return self.chances[place]
        return self.chances[-1] if self.chances else _HOPEFUL

    def _trial(self, current: int, limit: int) -> int:
        """Try another depth if there is time for it: none, then the neighbours, in turn."""
        near = (0, current + 1, current - 1, current + 2)
        others = [one for one in dict.fromkeys(near) if 0 <= one <= limit and one != current]
        if not others:
            return current
        other = others[self._trials % len(others)]
        seconds = other * (self.draft or 0.0) + self.verify_seconds(other + 1)
        cost = seconds * max(0.0, 1 - self.rate(other) / self.rate(current))
        if cost > self.credit:
            return current
        self.credit = 0.0
        self._trials += 1
        return other


def mix(before: float | None, new: float) -> float:
    """Give the estimate after a new observation."""
    return new if before is None else before + _WEIGHT * (new - before)

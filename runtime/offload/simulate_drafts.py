"""Tell how long a recorded run would take if its tokens were drafted on low-bit copies.

    draft ─ layer ─ names experts ─ layer ─ ... k tokens ─▶ verify k + 1 tokens in one pass
                        └ loads, earlier blocks first ─▶ link

The recording has each token's experts; which drafts are right, in tokens and in experts, is drawn.
Cache, policies, loads and time are those of `simulate`. Behind a wrong token, a draft follows the
experts of other tokens of the recording.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from moecc.runtime.offload.load import DEMAND
from moecc.runtime.offload.profile import Profile
from moecc.runtime.offload.recording import Recording
from moecc.runtime.offload.simulate import Run
from moecc.runtime.offload.trace import Request

Chosen = Sequence[tuple[int, ...]]
"""A token's experts in each block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What drafts are like."""

    depth: int
    """k tokens."""
    token: float
    """The chance that a token is right, where those before it are."""
    experts: float
    """The chance that a block's experts are named right; one of them is another otherwise."""
    size: float
    """Bytes of an expert's copy, over its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """A run with drafts in simulated time."""

    tokens: int
    passes: int
    seconds: float
    read_bytes: int

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def simulate_drafts(
    recording: Recording,
    profile: Profile,
    slots: Sequence[int],
    policy: str,
    draft: Draft,
    seed: int = 0,
) -> Drafted:
    """Run the decoding of a recording with drafts; `slots` of each pool are beside the copies."""
    dice = random.Random(seed)
    run = Run(recording, profile, slots, policy, "none")
    chosen = _chosen(recording)
    at = passes = 0
    while at + draft.depth < len(chosen):
        right = 0
        while right < draft.depth and dice.random() < draft.token:
            right += 1
        path = list(chosen[at : at + right + 1])
        path += [dice.choice(chosen) for _ in range(draft.depth - right)]
        for experts in path[:-1]:
            _draft(run, experts, draft, dice)
        _verify(run, path)
        at += right + 1
        passes += 1
    return Drafted(tokens=at, passes=passes, seconds=run.link.now, read_bytes=run.link.bytes)


def _chosen(recording: Recording) -> list[Chosen]:
    """Give the experts of each token that was decoded by itself."""
    single = [one for one in recording.events if isinstance(one, Request) and one.tokens == 1]
    count = len(recording.blocks)
    return [
        [one.experts for one in single[start : start + count]]
        for start in range(0, len(single) - count + 1, count)
    ]


def _draft(run: Run, chosen: Chosen, draft: Draft, dice: random.Random) -> None:
    """Compute a token with copies, and start reading what it names."""
    run.compute("model", run.speed.token)
    for block, experts in enumerate(chosen):
        demand = run.recording.blocks[block]
        _attend(run, 1)
        run.compute("overhead", run.speed.call + run.speed.launch)
        run.compute("experts", demand.active * demand.size * draft.size / run.speed.bandwidth)
        named = list(experts)
        if dice.random() >= draft.experts:
            named[dice.randrange(len(named))] = dice.randrange(demand.experts)
        keys = [(block, expert) for expert in sorted(set(named))]
        run.let_in(block, keys, DEMAND + 1 + block)


def _verify(run: Run, path: Sequence[Chosen]) -> None:
    """Compute several tokens in one pass."""
    run.compute("model", run.speed.token)
    for block in range(len(run.recording.blocks)):
        _attend(run, len(path))
        wanted = sorted({expert for token in path for expert in token[block]})
        run.serve(Request(block=block, tokens=len(path), experts=tuple(wanted), hits=0))


def _attend(run: Run, tokens: int) -> None:
    """Compute what is between two blocks."""
    others = run.recording.other_bytes / len(run.recording.blocks) / run.speed.bandwidth
    run.compute("model", run.speed.layer + others * max(1.0, tokens / run.speed.balance))

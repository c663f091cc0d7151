"""Draft tokens: with the model on low-bit experts, with another model, or from the prompt."""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)

from moecc.runtime.twins import Twins, drafting
from moecc.speculation.accept import Proposal, choose
from moecc.speculation.rewind import Rewinder
from moecc.speculation.stepper import Stepper


class Draft(Protocol):
    """Where drafted tokens come from."""

    def propose(self, ids: torch.Tensor, depth: int) -> Proposal:
        """Draft up to `depth` tokens after `ids` [1, T]."""
        ...


class SelfDraft:
    """The model itself, on copies of its experts; attention and its cache are shared."""

    def __init__(
        self,
        stepper: Stepper,
        rewinder: Rewinder,
        twins: Twins,
        score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        sample: bool,
        ends: torch.Tensor | None,
    ) -> None:
        """Draft with copies; `score(ids, logits)` processes logits [V], `ends` are last tokens."""
        self._stepper, self._rewinder, self._twins = stepper, rewinder, twins
        self._score, self._sample, self._ends = score, sample, ends

    def propose(self, ids: torch.Tensor, depth: int) -> Proposal:
        """Draft one token after the other, and take their keys and values back."""
        stepper, start = self._stepper.copy(), ids.shape[1]
        scores: list[torch.Tensor] = []
        self._rewinder.mark()
        with drafting(self._twins):
            for _ in range(depth):
                scores.append(self._score(ids, stepper.step(ids, 1)[0]))
                token = choose(scores[-1], self._sample)
                ids = torch.cat((ids, token.unsqueeze(0)), dim=1)
                stepper.extend(1)
                if self._ends is not None and bool(torch.isin(token, self._ends)):
                    break
        self._rewinder.take_back(len(scores), len(scores))
        probabilities = torch.stack(scores).softmax(-1) if self._sample else None
        return Proposal(tokens=ids[0, start:], probabilities=probabilities)


class Candidates:
    """One of transformers' candidate generators, asked for as many tokens as are wanted."""

    def __init__(self, generator: CandidateGenerator, sample: bool) -> None:
        self._generator = generator
        self._sample = sample

    def propose(self, ids: torch.Tensor, depth: int) -> Proposal:
        """Ask for candidates."""
        generator: Any = self._generator
        if isinstance(self._generator, PromptLookupCandidateGenerator):
            generator.num_output_tokens = depth
        else:
            generator.num_assistant_tokens = depth
        found, logits = generator.get_candidates(ids)
        tokens = found[0, ids.shape[1] :][:depth].to(ids.device)
        if logits is None or not self._sample:
            return Proposal(tokens=tokens)
        return Proposal(tokens=tokens, probabilities=logits[0, : len(tokens)].softmax(-1))


def from_prompt(config: Any, length: int) -> Candidates:
    """Draft what followed the latest tokens where they stood before."""
    generator = PromptLookupCandidateGenerator(
        eos_token_id=getattr(config, "_eos_token_tensor", None), max_length=length
    )
    return Candidates(generator, sample=False)


def from_assistant(
    assistant: Any, ids: torch.Tensor, config: Any, kwargs: dict[str, Any], processor: Any
) -> Candidates:
    """Draft with another model that has the same tokens."""
    generator = AssistedCandidateGenerator(
        input_ids=cast(torch.LongTensor, ids),
        assistant_model=assistant,
        generation_config=config,
        model_kwargs=dict(kwargs),
        logits_processor=processor,
    )
    generator.generation_config.assistant_confidence_threshold = 0  # the depth is chosen here
    return Candidates(generator, sample=config.do_sample)

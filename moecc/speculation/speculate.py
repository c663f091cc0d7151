"""Generate several tokens a pass: draft them cheaply, verify them together."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn
from transformers.generation.utils import GenerateDecoderOnlyOutput

from moecc.lenders import banks_of
from moecc.parallel import shares_of
from moecc.runtime.depth import MOST
from moecc.runtime.errors import InputError, OptionError
from moecc.runtime.schemes.scheme import SCHEMES
from moecc.runtime.twins import foreseen
from moecc.runtime.watch import watching
from moecc.speculation.accept import Proposal, accept
from moecc.speculation.cached import CACHED
from moecc.speculation.drafts import Draft, SelfDraft, from_assistant, from_prompt
from moecc.speculation.holding import Holding
from moecc.speculation.known import Speculation, known
from moecc.speculation.rewind import Rewinder
from moecc.speculation.stepper import Stepper

Generate = Callable[..., Any]
_NAMES = ("auto", CACHED, "prompt")


def speculate(
    k: int | str = "auto", *, draft: Any = "auto", most: int = MOST, streamer: Any = None
) -> Generate:
    """Make what `model.generate(..., custom_generate=)` takes to generate with drafts.

        model.generate(ids, custom_generate=moecc.speculate())

    The text is that of plain generation, token for token, or with sampling in distribution. Where
    two logits tie within rounding, one pass over several tokens may choose the other.

    `draft` says what names the coming tokens: "cached", the model itself with the experts that are
    in its cache, without those that are not; a scheme ("int4", "int3-g64", ...), in which the
    model's experts are copied once, and it drafts with these copies; another transformers model
    with the same tokens; or "prompt", what followed the latest tokens where they stood before. With
    the first two, a draft tells the cache which experts the verification will need. Copies take
    their bytes from `expert_memory`, where experts have a budget. "auto" is "cached" there, and
    "int4" elsewhere.

    `k` is how many tokens to draft, or "auto": as many as pay by the measured times, up to `most`,
    or none; copies that have a price are then made once 2 % of the time has paid for it, and go
    when drafts do not pay. A model can be compiled or not; its batch is one text. A `streamer` has
    to be given here too: transformers hands none to what `custom_generate` names.

    Raises `OptionError` for bad arguments, and when `generate` runs for copies that do not fit;
    `InputError` there for a batch, for beams, and for models whose state cannot be taken back.
    """
    if k != "auto" and (not isinstance(k, int) or isinstance(k, bool) or k < 0):
        raise OptionError(f'k is {k!r}; allowed: "auto" or a number of tokens')
    if most < 1:
        raise OptionError(f"most is {most!r}; allowed: a number of tokens above 0")
    if not isinstance(draft, nn.Module) and draft not in (*_NAMES, *SCHEMES):
        allowed = ", ".join((*_NAMES, "a model", str([*SCHEMES])))
        raise OptionError(f"draft is {draft!r}; allowed: {allowed}")

    def generate(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **kwargs: Any,
    ) -> Any:
        _refuse(model, input_ids, generation_config, kwargs)
        named = draft
        if draft == "auto":
            named = CACHED if banks_of(model) else "int4"
        about = known(model, named, most)
        fixed = None if k == "auto" else int(k)
        loop = _Loop(model, logits_processor, stopping_criteria, generation_config, streamer)
        return loop.run(named, about, fixed, input_ids, kwargs)

    return generate


def _refuse(model: Any, ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> None:
    """Raise `InputError` for what drafts cannot be made for."""
    if ids.shape[0] != 1:
        raise InputError(
            f"speculation generates one text at a time, not a batch of {len(ids)}: each would keep "
            "another number of drafted tokens; call generate for each, or leave custom_generate out"
        )
    if config.num_beams > 1 or config.is_assistant or model.config.is_encoder_decoder:
        raise InputError(
            "speculation is for greedy search and sampling with decoder-only models: no beams, no "
            "encoder"
        )
    if config.output_attentions or config.output_hidden_states:
        raise InputError(
            "speculation keeps no attentions or hidden states; leave these outputs out"
        )
    if any(shares_of(model)):
        raise InputError("speculation makes drafts on one rank; leave expert_parallel out")
    if not kwargs.get("use_cache", True):
        raise InputError("speculation needs use_cache=True")


class _Loop:
    """One generation."""

    def __init__(self, model: Any, processor: Any, stop: Any, config: Any, streamer: Any) -> None:
        self._model, self._processor, self._stop = model, processor, stop
        self._config, self._streamer = config, streamer
        self._sample: bool = config.do_sample
        self._logits: list[torch.Tensor] = []
        """Of every new token [V], where they are wanted."""
        self._scores: list[torch.Tensor] = []
        """Processed ones, likewise."""

    def run(
        self,
        draft: Any,
        about: Speculation,
        k: int | None,
        ids: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> Any:
        """Generate until something says stop."""
        model = self._model
        with watching() as uses:
            outputs = model._prefill(ids, self._config, kwargs, is_first_iteration=True)
        holding = Holding(about, uses, k)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, num_new_tokens=0)
        cache = kwargs.get("past_key_values")
        rewinder, stepper = Rewinder(cache), Stepper(model, kwargs)
        logits = outputs.logits[0, -1:].to(device=ids.device, dtype=torch.float32, copy=True)
        del outputs
        source: Draft | None = None
        nothing = Proposal(tokens=ids[0, :0])
        kept, done = self._keep(ids, nothing, logits)
        while True:
            ids = torch.cat((ids, kept.unsqueeze(0)), dim=1)
            stepper.extend(len(kept))
            if done:
                break
            source = source or self._source(draft, about, ids, stepper, rewinder)
            limit = min(self._stop.max_length - ids.shape[1] - 1, rewinder.most)
            if k is None and not holding.is_ready():
                limit = 0
            began = time.perf_counter()
            depth = about.depth.choose(limit) if k is None else min(k, limit)
            proposal = source.propose(ids, depth) if depth > 0 else nothing
            drafted = time.perf_counter()
            count = len(proposal.tokens)
            is_self = isinstance(source, SelfDraft)
            logits = self._verify(ids, proposal, stepper, rewinder, is_self=is_self)
            kept, done = self._keep(ids, proposal, logits)
            rewinder.take_back(count + 1 - len(kept), count + 1)
            seconds = drafted - began, time.perf_counter() - drafted
            about.count(count, len(kept), *seconds)
        if self._streamer is not None:
            self._streamer.end()
        return self._output(ids, cache)

    def _source(
        self,
        draft: Any,
        about: Speculation,
        ids: torch.Tensor,
        stepper: Stepper,
        rewinder: Rewinder,
    ) -> Draft:
        if draft == "prompt":
            return from_prompt(self._config, self._stop.max_length)
        if isinstance(draft, nn.Module):
            return from_assistant(draft, ids, self._config, stepper.kwargs, self._processor)
        ends = getattr(self._config, "_eos_token_tensor", None)
        return SelfDraft(stepper, rewinder, about.twins, self._score, self._sample, ends)

    def _verify(
        self,
        ids: torch.Tensor,
        proposal: Proposal,
        stepper: Stepper,
        rewinder: Rewinder,
        *,
        is_self: bool,
    ) -> torch.Tensor:
        """Give the model's logits [k + 1, V] after the text and after each drafted token."""
        count = len(proposal.tokens)
        if count == 0:
            return stepper.step(ids, 1)
        stepper = stepper.copy()
        stepper.extend(count)
        text = torch.cat((ids, proposal.tokens.unsqueeze(0)), dim=1)
        rewinder.mark()
        with foreseen() if is_self else nullcontext():
            return stepper.step(text, count + 1)

    def _score(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Process logits [V] of the token after `ids`."""
        processed: torch.Tensor = self._processor(ids, logits.clone().unsqueeze(0))
        return processed[0]

    def _keep(
        self, ids: torch.Tensor, proposal: Proposal, logits: torch.Tensor
    ) -> tuple[torch.Tensor, bool]:
        """Give the new tokens up to the first that ends the text, and whether one does."""
        scores: list[torch.Tensor] = []
        text = torch.cat((ids, proposal.tokens.unsqueeze(0)), dim=1)
        for place, one in enumerate(logits):
            scores.append(self._score(text[:, : ids.shape[1] + place], one))
        tokens = accept(proposal, torch.stack(scores), self._sample)
        for count, token in enumerate(tokens, 1):
            if self._config.output_logits:
                self._logits.append(logits[count - 1])
            if self._config.output_scores:
                self._scores.append(scores[count - 1])
            if self._streamer is not None:
                self._streamer.put(token.unsqueeze(0).cpu())
            ids = torch.cat((ids, token.view(1, 1)), dim=1)
            if bool(self._stop(ids, (scores[count - 1].unsqueeze(0),))):
                return tokens[:count], True
        return tokens, False

    def _output(self, ids: torch.Tensor, cache: Any) -> Any:
        if not self._config.return_dict_in_generate:
            return ids
        scores, logits = (
            tuple(one.unsqueeze(0) for one in kept) if wanted else None
            for kept, wanted in (
                (self._scores, self._config.output_scores),
                (self._logits, self._config.output_logits),
            )
        )
        made: dict[str, Any] = {"scores": scores, "logits": logits, "past_key_values": cache}
        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, ids), **made)

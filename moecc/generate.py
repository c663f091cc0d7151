"""Generate text with a transformers model, plain and compiled, and time both."""

import statistics
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import torch
from torch import nn

from moecc import capture
from moecc.passes.options import Options

Progress = Callable[[int, float], None]
"""Called after each new token with the count so far and seconds since the prompt went in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One generation."""

    tokens: tuple[int, ...]
    """The new ones."""
    prompt: int
    prefill_seconds: float
    decode_seconds: float
    """From the first new token to the last."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """New tokens a second after the first."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0


class _Clock:
    """A streamer (transformers' protocol) that notes when each token came."""

    def __init__(self, progress: Progress | None) -> None:
        self.times: list[float] = []
        self._progress = progress

    def put(self, value: torch.Tensor) -> None:
        self.times.append(perf_counter())
        if self._progress and len(self.times) > 1:
            self._progress(len(self.times) - 1, self.times[-1] - self.times[0])

    def end(self) -> None:
        pass


def generate(
    model: Any,
    prompt: torch.Tensor,
    new_tokens: int,
    progress: Progress | None = None,
    speculate: Callable[..., Any] | None = None,
) -> Timing:
    """Generate greedily from `prompt` [1, T], exactly `new_tokens` of them.

    With `speculate`, which is `moecc.speculate` with its arguments, by drafts.
    """
    clock = _Clock(progress)
    how = {} if speculate is None else {"custom_generate": speculate(streamer=clock)}
    out: torch.Tensor = model.generate(
        prompt,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        pad_token_id=0,
        **how,
    )
    first, *rest = clock.times[1:]
    return Timing(
        tokens=tuple(cast(list[int], out[0, prompt.shape[1] :].tolist())),
        prompt=prompt.shape[1],
        prefill_seconds=first - clock.times[0],
        decode_seconds=(rest[-1] if rest else first) - first,
    )


@contextmanager
def compiled(model: nn.Module, options: dict[str, Any]) -> Generator[None]:
    """Run a model through moecc inside, as it was outside.

    Compiles `model.forward`, which is what `generate` calls in prefill and in decode; dynamic
    shapes, so that two graphs serve every prompt length.
    """
    before = model.__dict__.get("forward")  # accelerate and others put one on the instance
    known = _compiled.setdefault(model, {})
    key = repr(sorted(options.items()))
    if key not in known:
        known[key] = torch.compile(model.forward, backend="moecc", dynamic=True, options=options)
    capture.adopt(model, Options.parse(options))
    model.forward = known[key]
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before
        capture.release(model)


_compiled: "weakref.WeakKeyDictionary[nn.Module, dict[str, Any]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token that two greedy generations do not share."""

    position: int
    """Among the new tokens, from 0."""
    gap: float
    """Between the two tokens' logits, by the model's own code."""
    rounding: float
    """What the model's dtype leaves open at logits of this size."""

    @property
    def is_tie(self) -> bool:
        """Both tokens are best within rounding: either choice is right."""
        return self.gap <= self.rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The same text, generated plainly and through moecc, alternating."""

    eager: tuple[Timing, ...]
    moecc: tuple[Timing, ...]
    compile_seconds: float
    """The first generation through moecc, which compiles."""
    difference: "Difference | None"
    """Where the tokens part; None if all generations gave the same."""

    def median(self, contender: str, rate: str) -> float:
        """Median `prefill_rate` or `decode_rate` of `eager` or `moecc`, tokens a second."""
        timings: tuple[Timing, ...] = getattr(self, contender)
        return statistics.median(getattr(timing, rate) for timing in timings)


def compare(
    model: nn.Module,
    prompt: torch.Tensor,
    new_tokens: int,
    options: dict[str, Any],
    rounds: int = 3,
    progress: Callable[[str], Progress] | None = None,
) -> Comparison:
    """Generate `rounds` times each way, alternating, after one warm-up of each."""

    def watch(what: str) -> Progress | None:
        return progress(what) if progress else None

    generate(model, prompt, new_tokens, watch("warming up"))
    start = perf_counter()
    with compiled(model, options):
        generate(model, prompt, new_tokens, watch("compiling"))
    compile_seconds = perf_counter() - start
    eager: list[Timing] = []
    moecc: list[Timing] = []
    for number in range(1, rounds + 1):
        eager.append(generate(model, prompt, new_tokens, watch(f"eager {number}/{rounds}")))
        with compiled(model, options):
            moecc.append(generate(model, prompt, new_tokens, watch(f"moecc {number}/{rounds}")))
    different = [one for one in (*eager, *moecc) if one.tokens != eager[0].tokens]
    return Comparison(
        eager=tuple(eager),
        moecc=tuple(moecc),
        compile_seconds=compile_seconds,
        difference=find_difference(model, prompt, eager[0], different[0]) if different else None,
    )


def find_difference(model: Any, prompt: torch.Tensor, one: Timing, other: Timing) -> Difference:
    """Find where two generations part, and how close the choice was.

    Rounding is four units in the last place of the dtype: a router or a logit near a tie falls
    either way when sums are taken in another order.
    """
    pairs = enumerate(zip(one.tokens, other.tokens, strict=True))
    position = next(i for i, (left, right) in pairs if left != right)
    shared = torch.tensor([one.tokens[:position]], dtype=prompt.dtype)
    with torch.no_grad():
        logits = model(torch.cat((prompt, shared), dim=1)).logits[0, -1].float()
    left, right = (logits[timing.tokens[position]].item() for timing in (one, other))
    rounding = 4 * torch.finfo(model.dtype).eps * max(abs(left), abs(right))
    return Difference(position=position, gap=abs(left - right), rounding=rounding)

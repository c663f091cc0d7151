"""Generate with a model that `moecc.load` loaded: `moecc run --expert-memory --speculate`."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from moecc.generate import Timing, compiled, generate
from moecc.prompted import load_prompted
from moecc.render import print_experts, print_speculation
from moecc.reporting import Report, report
from moecc.terminal import counting, live_line


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadDemo:
    """A text, and what the cache did for it."""

    prompt: str
    text: str
    timings: tuple[Timing, ...]
    """One of each round, the first after one that compiles."""
    speculative: tuple[Timing, ...]
    """The same with drafts, if there are any, after the rounds without."""
    report: Report

    @property
    def same_tokens(self) -> bool:
        """Drafts changed nothing."""
        return all(one.tokens == self.timings[0].tokens for one in self.speculative)


def run(
    name: str,
    prompt: str,
    new_tokens: int,
    rounds: int,
    options: dict[str, Any],
    dtype: str,
    quiet: bool,
    speculate: Callable[..., Any] | None = None,
) -> OffloadDemo:
    """Load with `moecc.load`, compile, and generate with a live line on stderr.

    `speculate` is that of `generate`: rounds with drafts follow those without. Raises what
    `load_prompted` does.
    """
    with live_line(f"loading {name}", quiet) as tell:
        loaded = load_prompted(name, prompt, new_tokens, dtype, options, tell)
        model, ids = loaded.model, loaded.ids
        with compiled(model, options):
            generate(model, ids, new_tokens, counting(tell, new_tokens, "compiling"))
            watch = partial(counting, tell, new_tokens)
            timings = tuple(
                generate(model, ids, new_tokens, watch(f"round {number}/{rounds}"))
                for number in range(1, rounds + 1)
            )
            speculative: tuple[Timing, ...] = ()
            if speculate is not None:
                generate(model, ids, new_tokens, watch("compiling drafts"), speculate)
                speculative = tuple(
                    generate(model, ids, new_tokens, watch(f"drafts {number}/{rounds}"), speculate)
                    for number in range(1, rounds + 1)
                )
    return OffloadDemo(
        prompt=prompt,
        text=loaded.tokenizer.decode(timings[-1].tokens),
        timings=timings,
        speculative=speculative,
        report=report(model),
    )


def print_demo(shown: OffloadDemo, console: Console) -> None:
    """Print the text, the speed, and where experts were."""
    console.print(shown.prompt, style="dim", markup=False, highlight=False, end="")
    console.print(shown.text, markup=False, highlight=False)
    console.print()
    _print_rates("", shown.timings, console)
    if shown.speculative:
        _print_rates("with drafts ", shown.speculative, console)
        same = "the same tokens" if shown.same_tokens else "other tokens where logits tie"
        console.print(f"{same} both ways")
    for one in shown.report.speculation:
        print_speculation(one, console)
    if shown.report.experts is not None:
        print_experts(shown.report.experts, console)


def _print_rates(what: str, timings: Sequence[Timing], console: Console) -> None:
    prefill, decode = (
        statistics.median(getattr(one, rate) for one in timings)
        for rate in ("prefill_rate", "decode_rate")
    )
    console.print(
        f"{what}prefill {prefill:.1f}, decode {decode:.1f} tokens/s (median)\n", highlight=False
    )

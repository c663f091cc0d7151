"""Show moecc at work on a prompt: `moecc run`."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from moecc.generate import Comparison, Difference, compare
from moecc.model_forms import find_weights_of
from moecc.models import load_model
from moecc.reporting import Report, report
from moecc.runtime.errors import ModelError
from moecc.terminal import counting, live_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """A text, how it was made and how fast."""

    prompt: str
    text: str
    comparison: Comparison
    report: Report

    @property
    def same_tokens(self) -> bool:
        """Eager and moecc gave the same."""
        return self.comparison.difference is None


def run(
    name: str,
    prompt: str,
    new_tokens: int,
    rounds: int,
    options: dict[str, Any],
    dtype: str,
    quiet: bool,
) -> Demo:
    """Load, generate both ways with a live line on stderr, and compare.

    Raises `ModelError` for a MODEL without a tokenizer or with too short a context.
    """
    with live_line(f"loading {name}", quiet) as tell:
        find_weights_of(name)
        loaded = load_model(name, dtype)
        ids: torch.Tensor = loaded.tokenizer(prompt, return_tensors="pt").input_ids
        check_length(name, loaded.model, ids.shape[1] + new_tokens)
        watch = partial(counting, tell, new_tokens)
        comparison = compare(loaded.model, ids, new_tokens, options, rounds, watch)
    return Demo(
        prompt=prompt,
        text=loaded.tokenizer.decode(comparison.moecc[-1].tokens),
        comparison=comparison,
        report=report(loaded.model),
    )


def print_demo(shown: Demo, console: Console) -> None:
    """Print the text, both speeds, and whether the tokens are the same."""
    console.print(shown.prompt, style="dim", markup=False, highlight=False, end="")
    console.print(shown.text, markup=False, highlight=False)
    console.print()
    made = shown.comparison
    table = Table("tokens/s (median)", box=None, pad_edge=False)
    for column in ("eager", "moecc", "ratio"):
        table.add_column(column, justify="right")
    prompt, new = made.moecc[0].prompt, len(made.moecc[0].tokens)
    rows = ((f"prefill of {prompt}", "prefill_rate"), (f"decode of {new}", "decode_rate"))
    for label, rate in rows:
        eager, moecc = made.median("eager", rate), made.median("moecc", rate)
        table.add_row(label, f"{eager:.1f}", f"{moecc:.1f}", f"{moecc / eager:.2f}x")
    console.print(table)
    blocks = max((len(graph.blocks) for graph in shown.report.graphs), default=0)
    console.print(
        f"{blocks} MoE blocks · first run, compiling: {made.compile_seconds:.0f} s", highlight=False
    )
    console.print(_verdict(made.difference), highlight=False)


def _verdict(difference: Difference | None) -> str:
    if difference is None:
        return "the same tokens both ways"
    where = f"new token {difference.position} differs: the two choices' logits are "
    sizes = f"{difference.gap:.3g} apart, and rounding leaves {difference.rounding:.3g} open"
    advice = "; compare with --dtype float32" if difference.is_tie else ""
    return where + sizes + advice


def check_length(name: str, model: nn.Module, length: int) -> None:
    """Raise `ModelError` if a model does not take so many tokens."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and length > int(limit):
        raise ModelError(
            f"prompt and new tokens are {length} together and {name!r} takes {limit}; "
            "shorten the prompt or lower -n"
        )

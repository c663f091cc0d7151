"""Answer `moecc why`: what was matched and how, what was not, and what would make it match."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from moecc.inspection import Inspection
from moecc.passes.ir import Miss, MoeBlock
from moecc.records import Record
from moecc.runtime.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One block, or one thing that looks like a block."""

    path: str
    matched: bool
    source: str
    """The user's line: of the block, or of what stood in the way."""
    reason: str
    """What was recognised, or how far it went and where it stopped."""
    node: str
    """The node that stood in the way, or the one that the block became."""
    advice: str
    """What would make it match; empty for what did."""


_ADVICE: tuple[tuple[str, str], ...] = (
    (r"gradients are wanted", "call it under torch.no_grad(), or requires_grad_(False) first"),
    (r"training mode", "call model.eval() before torch.compile"),
    (r"hooks", "remove the hooks, or add them to a module around the block"),
    (r"len\(\) of a tensor", "take the size from .shape, so that it holds for other token counts"),
    (r"decides by a size", "compute the same for every token count; 0 and 1 may be told apart"),
    (r"decides by the values", "decide by the chosen ids, not by scores or weights"),
    (r"changes attributes", "keep counters and caches out of the block's forward"),
    (r"writes to its (inputs|parameters)", "write to a copy"),
    (r"tensor from outside", "register the tensor as a buffer of the module"),
    (r"between the experts and their sum", "only move, add and multiply what experts give"),
    (r"used for something else", "use what experts give in the weighted sum only"),
    (r"not all alike", "give all experts of a block one class and one size"),
    (r"shared between experts", "give each expert parameters of its own"),
    (r"cannot be read|is not one that kernels compute", "use an elementwise activation of known "
     "operations (moecc.codegen.activation.OPERATIONS), or add the missing one"),
    (r"strides", "store the weights contiguously: .contiguous()"),
    (r"which moecc does not read", "use plain floating-point parameters"),
    (r"is used by .* too", "keep values from the middle of the block inside it"),
    (r"in place in the middle", "write in place before the block or after it"),
    (r"each on its own buffer", "keep the experts' weights in stacked parameters [E, ., .]"),
    (r"declined", "install what the message names, or choose another emitter with --kernels"),
)  # fmt: skip
"""What to do, by what a reason says; the first that fits."""
_DEFAULT = "write it in a way that passes/styles lists, or report it with `moecc passes --dump DIR`"


def answers(seen: Inspection, path: str = "") -> tuple[Answer, ...]:
    """Answer for every candidate at or under a module path, each once, matched ones first.

    Of layers that were left out, those like them answer. Raises `ModelError` if there is no
    candidate under `path` though there are others.
    """
    asked = path
    for stack in seen.folded:
        path = stack.traced(path)
    every = {(one.path, one.reason): one for one in _all(seen.records)}
    matched = {one.path for one in every.values() if one.matched}
    found = [one for one in every.values() if one.matched or one.path not in matched]
    wanted = [one for one in found if not path or f"{one.path}.".startswith(f"{path}.")]
    if found and not wanted:
        known = ", ".join(dict.fromkeys(one.path for one in found))
        raise ModelError(f"nothing under {path!r} looks like a MoE block; there is {known}")
    if path != asked:
        wanted = [
            replace(
                one,
                path=asked + one.path.removeprefix(path),
                reason=f"{one.reason}; seen in {one.path}, which is like it",
            )
            for one in wanted
        ]
    return tuple(sorted(wanted, key=lambda one: not one.matched))


def print_answers(found: Sequence[Answer], console: Console) -> None:
    """Print the answers, one paragraph each."""
    if not found:
        console.print("nothing in this model looks like a MoE block")
    for one in found:
        mark = "[green]matched[/green]" if one.matched else "[red]not matched[/red]"
        console.print(f"{mark} [b]{one.path}[/b]", highlight=False)
        console.print(f"  {one.reason}", markup=False, highlight=False, soft_wrap=True)
        place = " · ".join(filter(None, (one.source, one.node and f"node {one.node}")))
        if place:
            console.print(f"  at {place}", markup=False, highlight=False, style="dim")
        if one.advice:
            console.print(f"  to match: {one.advice}", markup=False, highlight=False)


def _all(records: Sequence[Record]) -> Iterator[Answer]:
    for record in records:
        kernels = {lowering.block: lowering.kernel for lowering in record.lowerings}
        yield from (_matched(block, kernels.get(block.path, "")) for block in record.blocks)
        yield from (_missed(miss) for miss in record.misses if miss.where != "graph")


def _matched(block: MoeBlock, kernel: str) -> Answer:
    router = f"; router: {block.router}" if block.router else ""
    return Answer(
        path=block.path,
        matched=True,
        source=block.source,
        reason=(
            f"{block.style} style, {block.active} of {block.experts} experts, "
            f"{block.activation}{router}; kernel {kernel}"
        ),
        node=block.output,
        advice="",
    )


def _missed(miss: Miss) -> Answer:
    advice = next((text for pattern, text in _ADVICE if re.search(pattern, miss.why)), _DEFAULT)
    return Answer(
        path=miss.where,
        matched=False,
        source=miss.source,
        reason=miss.why,
        node=miss.node,
        advice=advice,
    )

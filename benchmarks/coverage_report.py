"""Judge what `benchmarks.coverage` found, and write docs/coverage.md."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

PHASES = ("prefill", "decode", "uncompiled")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Error that is still rounding; of the median token in bfloat16, where router ties flip tokens."""
_MEANING = {
    "raised": "every MoE layer runs as one fused call: in prefill, in decode, and uncompiled",
    "partly raised": "some MoE layers do",
    "not raised": "none does; the model computes what it computed before",
    "wrong": "it failed, or differs from eager by more than rounding",
}


def verdict(one: dict[str, Any]) -> str:
    """Sum up a family: wrong, raised, partly raised, not raised."""
    if "failure" in one or not one["error"] <= TOLERANCE[one["dtype"]]:
        return "wrong"
    phases = [one[phase] for phase in PHASES if one[phase] is not None]
    if all(calls["raised"] >= calls["layers"] for calls in phases):
        return "raised"
    return "partly raised" if any(calls["raised"] for calls in phases) else "not raised"


def raised(one: dict[str, Any]) -> list[str]:
    """Write how many layers each phase raised, and of how many where not all layers ran."""
    layers = one["prefill"]["layers"]
    phases = (one[phase] for phase in PHASES)
    return [
        "–"
        if calls is None
        else f"{calls['raised']}" + (f"/{calls['layers']}" if calls["layers"] != layers else "")
        for calls in phases
    ]


def page(found: list[dict[str, Any]]) -> str:
    """Give the page as Markdown."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: list[dict[str, Any]]) -> Iterator[str]:
    runs = {(one["inner"], one["dtype"]) for one in found if "failure" not in one}
    kinds = "; ".join(f"inner backend {inner}, {dtype}" for inner, dtype in sorted(runs))
    yield "# Coverage"
    yield ""
    yield "Written by `python -m benchmarks.coverage --markdown docs/coverage.md`; do not edit."
    yield ""
    yield (
        f"The {len(found)} families of transformers {version('transformers')} with MoE blocks, as "
        "tiny random models (`moecc/tiny_families.py`), each in a process of its own: prefills of "
        "three shapes, each with three cached decode steps where the family has a cache, beside "
        f"the uncompiled model with its `eager` experts. {kinds[:1].upper()}{kinds[1:]}, "
        f"torch {version('torch').partition('+')[0]}, on a CPU."
    )
    yield ""
    yield "| | families | meaning |"
    yield "|---|---:|---|"
    for kind, meaning in _MEANING.items():
        yield f"| {kind} | {sum(one['verdict'] == kind for one in found)} | {meaning} |"
    yield ""
    yield (
        "*Layers* counts the modules that own experts and that ran; *prefill* and *decode* count "
        "fused calls in the worst forward, *uncompiled* those of the original module, which is "
        "what `torch.compile(model).generate()` calls; 1/1 where one layer ran only. "
        "*Graphs* is what a prefill goes through: more than 1 is a model that Dynamo breaks. "
        "*Error* is the largest of all calls, relative to the norm of eager's output; of the "
        "median token in bfloat16, where ties in a router round either way."
    )
    yield ""
    yield "| family | model | layers | prefill | decode | uncompiled | graphs | error | |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---|"
    yield from map(_row, found)
    reasons = [one for one in found if one.get("failure") or one.get("misses")]
    if reasons:
        yield ""
        yield "## What was left alone, and why"
        for one in reasons:
            yield ""
            yield f"**{one['family']}**"
            yield ""
            for reason in [one["failure"]] if "failure" in one else one["misses"]:
                yield f"- {_text(reason)}"


def _row(one: dict[str, Any]) -> str:
    if "failure" in one:
        return f"| {one['family']} | | | | | | | | failed |"
    prefill = one["prefill"]
    cells = (
        one["family"],
        one["model"],
        prefill["layers"],
        *raised(one),
        prefill["graphs"],
        f"{one['error']:.0e}",
        "" if one["verdict"] == "raised" else one["verdict"],
    )
    return f"| {' | '.join(map(str, cells))} |"


def _text(reason: str) -> str:
    """Keep Markdown from reading names such as `__init__` or `a|b` as its own."""
    return "".join(f"\\{letter}" if letter in "_*<>|`" else letter for letter in reason)

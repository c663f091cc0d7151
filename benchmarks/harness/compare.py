"""Say what changed between two runs beyond what their rounds differ by.

python -m benchmarks.harness.compare OLD.jsonl NEW.jsonl
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness.record import Record, Value, read

ASSUMED = 0.1
"""Noise of a value without a spread: runs of the same commit differ by a tenth."""


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """Give a line for each value that changed, appeared or went, and what the runs differ in."""
    before = {one.key: one for one in old}
    after = {one.key: one for one in new}
    lines: list[str] = []
    for key, one in after.items():
        if key not in before:
            lines.append(f"new: {title(one)}")
            continue
        lines += _changes(before[key], one)
    # What is in no scenario of the new run was not asked for.
    asked = {(one.suite, one.scenario) for one in new}
    lines += [
        f"gone: {title(one)}"
        for key, one in before.items()
        if key not in after and (one.suite, one.scenario) in asked
    ]
    return [*_circumstances(old, new), *(lines or ["nothing changed beyond noise"])]


def title(one: Record) -> str:
    """Name what was measured."""
    cell = ", ".join(f"{name} {value}" for name, value in one.cell.items())
    return ", ".join(filter(None, (f"{one.suite} {one.scenario}", cell, one.contender)))


def _circumstances(old: Sequence[Record], new: Sequence[Record]) -> Iterator[str]:
    if any(one.quick for one in (*old, *new)):
        yield "quick figures say nothing about speed"
    machines = [{one.machine.cpu for one in run} for run in (old, new)]
    if machines[0] != machines[1]:
        yield f"machines differ: {sorted(machines[0])} and {sorted(machines[1])}"


def _changes(old: Record, new: Record) -> Iterator[str]:
    for what in ("skipped", "wrong"):
        if getattr(old, what) != getattr(new, what):
            yield f"{what}: {title(new)}: {getattr(new, what) or 'no longer'}"
    for name, value in new.values.items():
        if name in old.values and (ratio := change(old.values[name], value)):
            better = (ratio < 1) == value.less
            noise = "" if value.spread else f" (no spread: noise of {ASSUMED:.0%} assumed)"
            yield (
                f"{'better' if better else 'WORSE'}: {title(new)}: {name} "
                f"{old.values[name].median:.4g} -> {value.median:.4g}, {ratio:.2f}x{noise}"
            )


def change(old: Value, new: Value) -> float | None:
    """Give new over old, or None if the spreads of both, or the assumed noise, explain it."""
    low, high = _bounds(old)
    new_low, new_high = _bounds(new)
    if new_low <= high and low <= new_high:
        return None
    return new.median / old.median if old.median else float("inf")


def _bounds(value: Value) -> tuple[float, float]:
    """Give the spread; half of the assumed noise to both sides where none is known."""
    if value.spread is not None:
        return value.spread
    margin = abs(value.median) * ASSUMED / 2
    return value.median - margin, value.median + margin


if __name__ == "__main__":
    old, new = (read(Path(name)) for name in sys.argv[1:3])
    print("\n".join(compare(old, new)))

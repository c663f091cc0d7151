"""Write what programs recorded as the tables of docs/benchmarks.md."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks import kernel_table, quality_table

Told = Mapping[str, Any]
"""What a program wrote."""
_LAYER = ("eager", "grouped_mm", "batched_mm")


def layer(told: Sequence[Told]) -> str:
    """Give milliseconds of `benchmarks.layer`, a line for each contender, and moecc's lead."""
    rows: list[Told] = told[0]["results"]
    cells = list(dict.fromkeys((row["dtype"], row["tokens"]) for row in rows))
    found = {(row["contender"], row["dtype"], row["tokens"]): row for row in rows}
    theirs = [f"{name}{ending}" for name in _LAYER for ending in ("", " + inductor")]
    names = [*theirs, "onnxruntime", "kt-kernel", "moecc kernel", "moecc"]
    lines = [["", *(f"{dtype} T={tokens}" for dtype, tokens in cells)]]
    lines += [
        [name, *(_milliseconds(found.get((name, *cell))) for cell in cells)]
        for name in names
        if any((name, *cell) in found for cell in cells)
    ]
    floors = [found["moecc", *cell]["floor_milliseconds"] for cell in cells]
    lines.append(["floor", *(f"{floor:.1f}" for floor in floors)])
    leads = [
        min(found[name, *cell]["milliseconds"] for name in theirs if "batched" not in name)
        / found["moecc", *cell]["milliseconds"]
        for cell in cells
    ]
    best = "**best of eager, grouped_mm over moecc**"
    return _table([*lines, [best, *(f"**{lead:.2f}x**" for lead in leads)]])


def _milliseconds(row: Told | None) -> str:
    return "–" if row is None or row["milliseconds"] is None else f"{row['milliseconds']:.1f}"


def kernels(told: Sequence[Told]) -> str:
    """Give the table of the first record, with the rows of the others below it."""
    rows = [row for one in told for row in one["results"]]
    text = kernel_table.write({**told[0], "results": rows})
    return text.partition("\n\n")[2]


def decoder(told: Sequence[Told]) -> str:
    """Give tokens a second of each kind, and moecc's over them."""
    lines = [["", "prefill", "", "decode", ""]]
    for row in (row for one in told for row in one["results"]):
        ours = row["contender"] == "moecc"
        name = f"{row['kind']}: moecc" if ours else row["contender"]
        ratios = [f"{row[f'{phase}_ratio']:.2f}x" for phase in ("prefill", "decode")]
        prefill, decode = ["", ""] if ours else ratios
        lines.append([name, f"{row['prefill_rate']:.0f}", prefill])
        lines[-1] += [f"{row['decode_rate']:.1f}", decode]
    return _table(lines)


def compiling(told: Sequence[Told]) -> str:
    """Give seconds, calls beside those of plain inductor, which come in milliseconds."""
    rows: list[Told] = told[0]["rows"]
    plain = {row["warm"]: row for row in rows if row["contender"] == "inductor"}
    heads = ["first", "second", "Dynamo", "passes", "inner", "kernels", "prefill, ms"]
    lines = [["", *heads, "one token, ms"]]
    for row in sorted(rows, key=lambda one: one["warm"]):
        beside = plain.get(row["warm"])
        line = [f"{row['contender']}, {'warm' if row['warm'] else 'cold'}"]
        for name in ("first", "second"):
            other = beside is not None and row is not beside
            ratio = f", {row[name] / beside[name]:.2f}x" if beside and other else ""
            line.append(f"{row[name]:.1f}{ratio}")
        parts = (row[name] for name in ("dynamo", "passes", "inner", "kernels"))
        line += [f"{part:.1f}" if part else "" for part in parts]
        lines.append([*line, *(f"{row[name] * 1e3:.1f}" for name in ("prefill", "decode"))])
    return _table(lines)


def offload(told: Sequence[Told]) -> str:
    """Give tokens a second, over lru in the same memory, and what was read and waited for."""
    heads = ["tokens/s", "over lru", "simulated", "hits", "MB a token", "demand wait"]
    lines = [["", *heads]]
    rows: list[Told] = told[0]["results"]
    for row in rows:
        base = next(
            one["tokens_per_second"]
            for one in rows
            if (one["contender"], one["memory"]) == ("lru", row["memory"])
        )
        rate = row["tokens_per_second"]
        name = f"{row['memory'].rstrip('%')} %, {row['contender']}"
        lines.append([name, f"{rate:.1f}", f"{rate / base:.2f}x"])
        lines[-1] += [
            _known(row["simulated"], "{:.1f}"),
            _known(row["hit_rate"] and row["hit_rate"] * 100, "{:.1f} %"),
            _known(row["megabytes_per_token"], "{:.1f}"),
            _known(row["demand_wait"], "{:.1f} ms"),
        ]
    return _table(lines)


def speculate(told: Sequence[Told]) -> str:
    """Give tokens a second of each contender, budgets of memory beside each other."""
    rows: list[Told] = told[0]["results"]
    budgets = list(dict.fromkeys(row["memory"] for row in rows))
    heads = ("over lru", "drafts right", "MB a token")
    lines = [["decode"]]
    for memory in budgets:
        lines[0] += [f"{memory.rstrip('%')} %: tokens/s", *heads]
    found = {(row["contender"], row["memory"]): row for row in rows}
    for name in dict.fromkeys(row["contender"] for row in rows):
        line = [name.replace("k=", "drafts of ")]
        for memory in budgets:
            row = found[name, memory]
            rate = row["tokens_per_second"]
            line += [f"{rate:.1f}", f"{rate / found['lru', memory]['tokens_per_second']:.2f}x"]
            line.append(_known(row["accepted"] and row["accepted"] * 100, "{:.0f} %"))
            line.append(f"{row['megabytes_per_token']:.1f}")
        lines.append(line)
    return _table(lines)


def quality(told: Sequence[Told]) -> str:
    """Give bits, KL, perplexity and agreement, models beside each other."""
    return quality_table.write(dict(told[0]))


def _known(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(lines: Iterable[Sequence[str]]) -> str:
    head, *rest = ("|".join(["", *(f" {c} " if c else " " for c in line), ""]) for line in lines)
    return "\n".join([head, "|---" + "|---:" * (head.count("|") - 2) + "|", *rest])


TABLES: dict[str, Callable[[Sequence[Told]], str]] = {
    "compile": compiling,
    "decoder": decoder,
    "kernels": kernels,
    "layer": layer,
    "offload": offload,
    "quality": quality,
    "speculate": speculate,
}

"""Write records as Markdown: a table for each scenario, under the machine that it is of."""

from collections.abc import Iterator, Sequence

from benchmarks.harness.machine import UNKNOWN
from benchmarks.harness.record import Record


def page(records: Sequence[Record]) -> str:
    """Give all tables; quick records are refused, as their figures mean nothing.

    Raises `ValueError` for those.
    """
    if any(one.quick for one in records):
        raise ValueError("quick records are not published: run without --quick")
    return "\n\n".join(tables(records))


def tables(records: Sequence[Record]) -> Iterator[str]:
    """Give a table for each scenario."""
    scenarios = dict.fromkeys((one.suite, one.scenario, one.command) for one in records)
    for suite, scenario, command in scenarios:
        mine = [
            one
            for one in records
            if (one.suite, one.scenario, one.command) == (suite, scenario, command)
        ]
        yield "\n".join([f"**{suite}: {scenario}**", "", *_scenario(mine, command)])


def stamp(date: str | None, commit: str | None, machine: str) -> str:
    """Say when and on what a record was made, as far as it says."""
    return f"{date or 'date unknown'}, commit {commit or UNKNOWN}, {machine}."


def _scenario(mine: Sequence[Record], command: str) -> Iterator[str]:
    first = mine[0]
    yield f"`{command}`: {stamp(first.date, first.commit, str(first.machine))}"
    yield ""
    measured = list(dict.fromkeys(name for one in mine for name in one.values))
    cells = list(dict.fromkeys(name for one in mine for name in one.cell))
    heads = [*cells, "contender", *(name.replace("_", " ") for name in measured)]
    yield f"| {' | '.join(heads)} | MB at most |"
    yield f"|{'---|' * (len(cells) + 1)}{'---:|' * (len(measured) + 1)}"
    for one in mine:
        places = [str(one.cell.get(name, "")) for name in cells]
        if told := (one.skipped and f"skipped: {one.skipped}") or one.wrong:
            figures = [told] + [""] * len(measured)
        else:
            figures = [_figure(one, mine, name) for name in measured]
            figures.append("" if one.peak_memory is None else f"{one.peak_memory / 1e6:.0f}")
        yield f"| {' | '.join([*places, one.contender, *figures])} |"
    yield ""
    for contender in dict.fromkeys(one.contender for one in mine):
        how = next(one.how for one in mine if one.contender == contender)
        yield f"- {contender}: `{how}`"


def _figure(one: Record, mine: Sequence[Record], name: str) -> str:
    """Give a median, how far rounds are from it, and how many times moecc's it is."""
    if name not in one.values:
        return ""
    value = one.values[name]
    text = f"{value.median:.4g}"
    if value.spread:
        text += f" ({value.spread[0]:.4g} to {value.spread[1]:.4g})"
    ours = next((x for x in mine if x.contender == "moecc" and x.cell == one.cell), None)
    if ours and ours is not one and name in ours.values and ours.values[name].median:
        text += f", {value.median / ours.values[name].median:.2f}x"
    return text

"""Print what `benchmarks.speculate` measured, and judge how well the depth was chosen."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.timing import table

K0 = "lfu + prefetch"
"""What not drafting is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender in one cell."""

    contender: str
    memory: str
    link: float
    """Megabytes a second."""
    text: str
    corrupt: float
    tokens_per_second: float
    spread: tuple[float, float]
    slots: int
    accepted: float | None = None
    """Of the drafted tokens."""
    tokens_per_pass: float | None = None
    megabytes_per_token: float
    milliseconds: dict[str, float]
    """Of a token: drafting, waiting for experts, and the rest."""
    same_tokens: bool
    tied: bool
    """Where tokens differ from plain decoding first, the two choices' logits are equal but for
    rounding (`moecc.generate.find_difference`)."""


def print_cell(rows: Sequence[Row]) -> None:
    """Print a line for each contender of a cell, and whether tokens are right."""
    base = next(row for row in rows if row.contender == "lru").tokens_per_second
    lines = [
        [_title(rows[0]), "tokens/s", "over lru", "slots", "right", "tokens a pass", "MB/token"]
    ]
    lines[0] += ["ms/token: draft", "wait", "rest"]
    for row in rows:
        right = "" if row.accepted is None else f"{row.accepted:.0%}"
        a_pass = "" if row.tokens_per_pass is None else f"{row.tokens_per_pass:.2f}"
        rate = row.tokens_per_second
        cells = (f"{rate:.1f}", f"{rate / base:.2f}x", str(row.slots), right, a_pass)
        parts = (f"{part:.1f}" for part in row.milliseconds.values())
        lines.append([row.contender, *cells, f"{row.megabytes_per_token:.1f}", *parts])
    print(f"\n{table(lines)}")
    different = [row.contender for row in rows if not row.same_tokens]
    wrong = [row.contender for row in rows if not row.tied]
    said = (
        f"tokens differ where logits tie: {different}" if different else "all gave the same tokens"
    )
    print(f"tokens are wrong: {wrong}" if wrong else said, flush=True)


def _title(row: Row) -> str:
    title = f"{row.text}, {row.memory}, {row.link:.0f} MB/s"
    return title + (f", {row.corrupt:.0f} % corrupted" if row.corrupt else "")


def judge(rows: Sequence[Row]) -> None:
    """Say for each cell, and in how many, auto is as fast as it has to be."""
    cells: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        cells[_title(row)][row.contender] = row.tokens_per_second
    lines = [["auto in", "tokens/s", "best depth", "auto over it", "over k=0"]]
    within = safe = 0
    for title, rates in cells.items():
        depths = {"k=0": rates[K0]} | {k: r for k, r in rates.items() if k.startswith("k=")}
        best = max(depths, key=lambda k: depths[k])
        over, over_none = rates["auto"] / depths[best], rates["auto"] / rates[K0]
        within, safe = within + (over >= 0.95), safe + (over_none >= 0.97)
        lines.append([title, f"{rates['auto']:.1f}", f"{best}, {depths[best]:.1f}"])
        lines[-1] += [f"{over:.2f}x", f"{over_none:.2f}x"]
    print(f"\n{table(lines)}")
    print(
        f"auto is within 5 % of the best depth in {within} of {len(cells)} cells, and no more than "
        f"3 % below not drafting in {safe}"
    )

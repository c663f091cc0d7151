"""Time a whole model from prompts to tokens, by batch and length, beside every way to run it here.

    python -m benchmarks.model --batch 1,4 --length 32,256 --steps 32 --rounds 3 --json FILE

The shipped model in float32, prompts from its validation text, greedy. Each contender has a process
of its own; they are asked in turn, and stopped in between. In each cell the first call of a
contender, of a few tokens, compiles and is not timed. A contender whose tokens are not those of
transformers' eager forward has no time; exit status is 1 if that is moecc.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.harness import contenders
from benchmarks.model_contenders import MAKERS, Generation, Guest, Prompts, Unable
from benchmarks.perplexity import find_texts
from benchmarks.timing import machine, stamp, table

REFERENCE = Path(__file__).parent / "reference"
JUDGE = "transformers eager"
"""Whose tokens are the right ones."""
WARM_UP = 4
"""Tokens of the call that is not timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender at one batch and length; no rates where it has other tokens, or cannot run."""

    contender: str
    batch: int
    length: int
    prefill_rate: float | None = None
    """Prompt tokens a second, all sequences together."""
    decode_rate: float | None = None
    """New tokens a second, all sequences together."""
    spread: dict[str, tuple[float, float]] | None = None
    peak_memory: int | None = None
    wrong: str = ""
    skipped: str = ""


def main() -> int:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=REFERENCE, help="a checkpoint's folder")
    parser.add_argument("--batch", default="1,4", help="sequences")
    parser.add_argument("--length", default="32,256", help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens after the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(MAKERS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    names = dict.fromkeys((JUDGE, *arguments.contenders.split(",")))
    absent = {name: contenders.why_absent(contenders.find(name)) for name in names}
    for name, reason in absent.items():
        if reason:
            print(f"{name} is skipped: {reason}")
    batches, lengths = (
        [int(one) for one in text.split(",")] for text in (arguments.batch, arguments.length)
    )
    context = max(lengths) + arguments.steps
    guests = {
        name: Guest(name, arguments.model, context) for name, reason in absent.items() if not reason
    }
    rows: list[Row] = []
    print(machine(), flush=True)
    try:
        for batch in batches:
            for length in lengths:
                prompts = prompts_of(arguments.model, batch, length)
                rows += measure(guests, prompts, arguments.steps, arguments.rounds)
    finally:
        for guest in guests.values():
            guest.close()
    if arguments.json:
        record = {**stamp(), "results": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row.wrong and row.contender.startswith("moecc") for row in rows))


def prompts_of(model: Path, batch: int, length: int) -> Prompts:
    """Take so many stretches of the model's validation text, each from another place."""
    models: Any = import_module("transformers")
    tokenizer = models.AutoTokenizer.from_pretrained(model, model_max_length=1 << 30)
    text = "".join(file.read_text(encoding="utf-8")[:20000] for file in find_texts(str(model)))
    ids: list[int] = tokenizer(text).input_ids
    apart = (len(ids) - length) // batch
    return [ids[apart * number : apart * number + length] for number in range(batch)]


def measure(guests: Mapping[str, Guest], prompts: Prompts, steps: int, rounds: int) -> list[Row]:
    """Let contenders take turns in one cell, and print the table."""
    made: dict[str, list[Generation]] = {name: [] for name in guests}
    unable: dict[str, str] = {}
    for number in range(rounds + 1):
        for name, guest in guests.items():
            if name in unable:
                continue
            try:
                generation = guest.run(prompts, steps if number else WARM_UP)
            except Unable as error:
                unable[name] = str(error)
                continue
            if number:
                made[name].append(generation)
    if JUDGE in unable:
        raise RuntimeError(f"{JUDGE}, which says what is right, did not run: {unable[JUDGE]}")
    right = made[JUDGE][0].tokens
    batch, length = len(prompts), len(prompts[0])
    rows = [
        Row(contender=name, batch=batch, length=length, skipped=unable[name])
        if name in unable
        else summed_up(name, batch, length, made[name], right)
        for name in guests
    ]
    _print(rows)
    return rows


def summed_up(name: str, batch: int, length: int, made: Sequence[Generation], right: object) -> Row:
    """Give the medians of a contender, if all its tokens are right."""
    if any(one.tokens != right for one in made):
        wrong = f"other tokens than {JUDGE}"
        return Row(contender=name, batch=batch, length=length, wrong=wrong)
    rates = {
        "prefill_rate": [batch * length / one.prefill for one in made],
        "decode_rate": [batch / one.step for one in made],
    }
    return Row(
        contender=name,
        batch=batch,
        length=length,
        prefill_rate=statistics.median(rates["prefill_rate"]),
        decode_rate=statistics.median(rates["decode_rate"]),
        spread={field: (min(values), max(values)) for field, values in rates.items()},
        peak_memory=max(one.peak_memory for one in made),
    )


def _print(rows: Sequence[Row]) -> None:
    title = f"batch {rows[0].batch}, length {rows[0].length}"
    lines = [[title, "prefill tokens/s", "decode tokens/s", "MB at most"]]
    for row in rows:
        if row.prefill_rate is None or row.decode_rate is None:
            lines.append([row.contender, row.wrong or row.skipped, "", ""])
            continue
        peak = f"{(row.peak_memory or 0) / 1e6:.0f}"
        lines.append([row.contender, f"{row.prefill_rate:.0f}", f"{row.decode_rate:.1f}", peak])
    print(f"\n{table(lines)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

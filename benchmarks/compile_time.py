"""Time compiling: the first call, another prompt length, a warm second process, and the calls.

    python -m benchmarks.compile_time --family qwen3_moe --layers 24 --hidden 256 --json FILE

Contenders are plain inductor, moecc with layers compiled once, and moecc with the graph whole. Each
compiles in a process of its own with an empty cache folder, then in a second process with the
folder of the first. They take turns, `--rounds` times, medians count. `Dynamo` is what is left of
both calls when the backend's time is taken away, the calls themselves included; `kernels` are the
passes that build moecc's own, `passes` the others; `inner` is the inner backend and its compiler.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.timing import alternate, machine, stamp, table

CONTENDERS = ("inductor", "moecc", "moecc whole")
LENGTHS = (16, 24)
"""Tokens of the first prompt and of the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender in one process; times in seconds."""

    contender: str
    warm: bool
    """The process found the caches that another left."""
    first: float
    """The first call."""
    second: float
    """The first call with a prompt of another length."""
    dynamo: float
    passes: float
    inner: float
    kernels: float
    """These four are of both calls."""
    prefill: float
    decode: float
    """A compiled call with the second prompt, and with one token."""


TIMES = tuple(field.name for field in fields(Row) if field.name not in ("contender", "warm"))
_BUILDING = ("lower", "lower_attention", "fuse_shared", "fuse_routers", "dense_linears")


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        row = compile_one(arguments.one, arguments.family, arguments.layers, arguments.hidden)
        print(json.dumps(asdict(row)))
        return
    names = arguments.contenders.split(",")
    rows = median(list(measure(names, sys.argv[1:], arguments.rounds)))
    print(f"{machine()}; {arguments.family}, {arguments.layers} layers of {arguments.hidden}")
    print(table(cells(rows)))
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("family", "layers", "hidden")}
        record = settings | {**stamp(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def measure(names: Sequence[str], settings: Sequence[str], rounds: int) -> Iterator[Row]:
    """Let contenders take turns, each in a process without caches and in one with them."""
    for _ in range(rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                homes = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
                paths = {home: f"{folder}/{home}" for home in homes}
                for warm in (False, True):
                    command = [sys.executable, "-m", __spec__.name, *settings, "--one", name]
                    environment = {**os.environ, **paths}
                    done = subprocess.run(
                        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
                    )
                    yield Row(**json.loads(done.stdout.splitlines()[-1]) | {"warm": warm})


def compile_one(contender: str, family: str, layers: int, hidden: int) -> Row:
    """Compile a model in this process for two prompt lengths, then for one token."""
    import torch
    from torch._dynamo.utils import calculate_time_spent

    from moecc.records import all_records
    from moecc.tiny import tiny_model

    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "use_cache": False}
    model: Any = tiny_model(family, **sizes)
    own = {} if contender == "inductor" else {"options": {"outline": contender == "moecc"}}
    call = torch.compile(model, backend=contender.split()[0], **own)
    prompts = [torch.arange(length).unsqueeze(0) % 100 + 3 for length in LENGTHS]
    with torch.no_grad():
        first, second = (_seconds(call, prompt) for prompt in prompts)
        backend = calculate_time_spent()["backend_compile"]
        steps = [step for record in all_records() for step in record.steps]
        one = prompts[0][:, :1].contiguous()
        call(one)
        times = alternate(
            {"prefill": lambda _: call(prompts[1]), "one": lambda _: call(one)}, seconds=2
        )
    spent = {name: sum(_milliseconds(steps, name)) / 1e3 for name in ("passes", "kernels")}
    return Row(
        contender=contender,
        warm=False,
        first=first,
        second=second,
        dynamo=first + second - backend,
        passes=spent["passes"],
        kernels=spent["kernels"],
        inner=backend - spent["passes"] - spent["kernels"],
        prefill=times["prefill"],
        decode=times["one"],
    )


def _milliseconds(steps: Sequence[Any], kind: str) -> Iterator[float]:
    """Give what each pass took: those that build kernels, or the others."""
    for step in steps:
        if (step.name in _BUILDING) == (kind == "kernels"):
            yield step.milliseconds


def _seconds(call: Callable[[Any], object], ids: Any) -> float:
    start = time.perf_counter()
    call(ids)
    return time.perf_counter() - start


def median(rows: Sequence[Row]) -> list[Row]:
    """Give each contender's medians over rounds, cold and warm."""
    of: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        of.setdefault((row.contender, row.warm), []).append(row)
    return [
        replace(
            same[0],
            **{name: statistics.median(getattr(one, name) for one in same) for name in TIMES},
        )
        for same in of.values()
    ]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Lay rows out as a table, calls beside those of plain inductor."""
    plain = {row.warm: row for row in rows if row.contender == "inductor"}
    lines = [
        [
            "seconds",
            "first",
            "second",
            "Dynamo",
            "passes",
            "inner",
            "kernels",
            "prefill",
            "one token",
        ]
    ]
    for row in rows:
        of = partial(_beside, row, plain.get(row.warm))
        line = [f"{row.contender}, {'warm' if row.warm else 'cold'}", of("first"), of("second")]
        line += [f"{getattr(row, name):.1f}" for name in ("dynamo", "passes", "inner", "kernels")]
        lines.append([*line, of("prefill", ".4f"), of("decode", ".4f")])
    return lines


def _beside(row: Row, plain: Row | None, name: str, digits: str = ".1f") -> str:
    seconds = getattr(row, name)
    ratio = f" ({seconds / getattr(plain, name):.2f}x)" if plain else ""
    return f"{seconds:{digits}}{ratio}"


if __name__ == "__main__":
    main()

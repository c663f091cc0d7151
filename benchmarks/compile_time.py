"""Time compiling: the first call, another prompt length, a warm second process, and the calls.

    python -m benchmarks.compile_time --family qwen3_moe,gpt_oss --layers 24,48 --json FILE
    python -m benchmarks.compile_time --calls --layers 4 --hidden 512
    python -m benchmarks.compile_time --quick

Contenders are plain inductor, and moecc with layers compiled once, with `inner="auto"` beside that,
and with the graph whole. Each compiles in a process of its own with an empty cache folder, then in
a second process with the folder of the first. They take turns, `--rounds` times, medians count.
`Dynamo` is what is left of a call when the backend's time is taken away, the call itself included;
`kernels` are the passes that build moecc's own, `passes` the others; `inner` is the inner backend
and its compiler.

`--calls` compiles with moecc in these three ways in one process and alternates their calls.
`--quick` has no inductor and no kernels to build, and says only that all of this works.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.timing import alternate, machine, stamp, table

CONTENDERS = ("inductor", "moecc", "moecc auto", "moecc whole")
LENGTHS = (16, 24)
"""Tokens of the first prompt and of the second."""
KINDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "deepseek_v3": lambda layers: {"first_k_dense_replace": 3},
    "gpt_oss": lambda layers: _repeat(layers, "sliding_attention", "full_attention"),
    "qwen3_next": lambda layers: _repeat(layers, *["linear_attention"] * 3, "full_attention"),
    "granitemoehybrid": lambda layers: _repeat(layers, *["mamba"] * 5, "attention"),
}
"""Which layers a family mixes, where its configuration does not say so for any number of them."""


def _repeat(layers: int, *kinds: str) -> dict[str, Any]:
    return {"layer_types": [kinds[layer % len(kinds)] for layer in range(layers)]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is compiled, and with `quick` by whom."""

    family: str
    layers: int
    hidden: int
    quick: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Where the seconds of a call that compiles went."""

    seconds: float
    dynamo: float
    passes: float
    inner: float
    kernels: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender in one process; times in seconds."""

    contender: str
    warm: bool
    """The process found the caches that another left."""
    first: Spent
    """The first call."""
    second: Spent
    """The first call with a prompt of another length."""
    prefill: float
    decode: float
    """A compiled call with the second prompt, and with one token."""
    peak: float
    """GB of memory, compilers that it started not included."""


_BUILDING = ("lower", "lower_attention", "fuse_shared", "fuse_routers", "dense_linears")


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--layers", default="6")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calls", action="store_true", help="time calls in pieces and whole")
    parser.add_argument("--quick", action="store_true", help="a few seconds, without inductor")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    models = [
        Model(family=family, layers=int(layers), hidden=arguments.hidden, quick=arguments.quick)
        for family in arguments.family.split(",")
        for layers in arguments.layers.split(",")
    ]
    if arguments.one:
        print(json.dumps(asdict(compile_one(arguments.one, models[0]))))
        return
    print(machine())
    names = ["moecc"] if arguments.quick else arguments.contenders.split(",")
    found: list[dict[str, Any]] = []
    for model in models:
        print(f"\n{model.family}, {model.layers} layers of {model.hidden}")
        if arguments.calls:
            times = time_calls([name for name in names if name != "inductor"], model)
            print(table(calls_cells(times)))
            found += [asdict(model) | {"contender": name} | one for name, one in times.items()]
            continue
        rows = median(list(measure(names, model, arguments.rounds)))
        print(table(cells(rows)))
        found += [asdict(model) | flat(row) for row in rows]
    if arguments.json:
        told = {**stamp(), "rounds": arguments.rounds, "rows": found}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")


def measure(names: Sequence[str], model: Model, rounds: int) -> Iterator[Row]:
    """Let contenders take turns, each in a process without caches and in one with them."""
    asked = [f"--{name}={getattr(model, name)}" for name in ("family", "layers", "hidden")]
    asked += ["--quick"] * model.quick
    for _ in range(rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                homes = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
                paths = {home: f"{folder}/{home}" for home in homes}
                for warm in (False, True):
                    command = [sys.executable, "-m", "benchmarks.compile_time", *asked]
                    done = subprocess.run(
                        [*command, "--one", name],
                        env={**os.environ, **paths}, check=True, stdout=subprocess.PIPE, text=True,
                    )  # fmt: skip
                    yield _row(json.loads(done.stdout.splitlines()[-1]), warm)


def _row(told: dict[str, Any], warm: bool) -> Row:
    spent = {name: Spent(**told[name]) for name in ("first", "second")}
    return Row(**told | spent | {"warm": warm})


def make(model: Model) -> Any:
    """Make a model with random weights."""
    from moecc.tiny import tiny_model

    sizes = {"num_hidden_layers": model.layers, "hidden_size": model.hidden, "use_cache": False}
    kinds = KINDS.get(model.family)
    return tiny_model(model.family, **sizes | (kinds(model.layers) if kinds else {}))


def compiled(contender: str, model: Model, **how: Any) -> Any:
    """Give a model as a contender compiles it."""
    import torch

    options: dict[str, Any] = {"outline": contender != "moecc whole"}
    options |= {"inner": "auto"} if contender == "moecc auto" else {}
    options |= {"inner": "eager", "kernels": "torch"} if model.quick else {}
    own = {} if contender == "inductor" else {"options": options}
    return torch.compile(make(model), backend=contender.split()[0], **own, **how)


def prompts() -> list[Any]:
    """Give two prompts, and one token."""
    import torch

    return [torch.arange(length).unsqueeze(0) % 100 + 3 for length in (*LENGTHS, 1)]


def compile_one(contender: str, model: Model) -> Row:
    """Compile a model in this process for two prompt lengths, then for one token."""
    import torch

    call = compiled(contender, model)
    first, second, one = prompts()
    with torch.no_grad():
        spent = [_spent(call, first), _spent(call, second)]
        call(one)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        times = _alternated({"moecc": call}, seconds=0.2 if model.quick else 2)["moecc"]
    return Row(contender=contender, warm=False, first=spent[0], second=spent[1], peak=most, **times)


def time_calls(names: Sequence[str], model: Model) -> dict[str, dict[str, float]]:
    """Compile a model as several contenders do, and let their calls take turns."""
    import torch

    calls = {name: compiled(name, model, dynamic=True) for name in names}
    with torch.no_grad():
        for call in calls.values():
            for prompt in prompts():
                call(prompt)
        return _alternated(calls, seconds=5)


def _alternated(calls: dict[str, Any], seconds: float) -> dict[str, dict[str, float]]:
    """Time compiled calls of the second prompt, and of one token."""
    _, second, one = prompts()
    times: dict[str, dict[str, float]] = {name: {} for name in calls}
    for what, ids in (("prefill", second), ("decode", one)):
        turns = {name: lambda _, call=call, ids=ids: call(ids) for name, call in calls.items()}
        for name, took in alternate(turns, seconds=seconds).items():
            times[name][what] = took
    return times


def _spent(call: Callable[[Any], object], ids: Any) -> Spent:
    """Make a call that compiles, and say where its time went."""
    from torch._dynamo.utils import calculate_time_spent

    from moecc.records import all_records

    known, before = len(all_records()), calculate_time_spent().get("backend_compile", 0.0)
    start = time.perf_counter()
    call(ids)
    seconds = time.perf_counter() - start
    backend = calculate_time_spent()["backend_compile"] - before
    took = {True: 0.0, False: 0.0}
    for record in all_records()[known:]:
        for step in record.steps:
            took[step.name in _BUILDING] += step.milliseconds / 1e3
    return Spent(
        seconds=seconds,
        dynamo=seconds - backend,
        passes=took[False],
        inner=backend - sum(took.values()),
        kernels=took[True],
    )


def median(rows: Sequence[Row]) -> list[Row]:
    """Give each contender's medians over rounds, cold and warm."""
    of: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        of.setdefault((row.contender, row.warm), []).append(row)
    return [
        replace(
            same[0],
            first=_median_spent([row.first for row in same]),
            second=_median_spent([row.second for row in same]),
            **_medians(same, ("prefill", "decode", "peak")),
        )
        for same in of.values()
    ]


def _median_spent(spent: Sequence[Spent]) -> Spent:
    return Spent(**_medians(spent, [field.name for field in fields(Spent)]))


def _medians(values: Sequence[object], names: Sequence[str]) -> dict[str, float]:
    return {name: statistics.median(getattr(one, name) for one in values) for name in names}


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Lay rows out as a table: seconds, those of both lengths apart, and milliseconds of calls."""
    plain = {row.warm: row for row in rows if row.contender == "inductor"}
    parts = ("dynamo", "passes", "inner", "kernels")
    lines = [["seconds", "first", "second", "Dynamo", *parts[1:], "prefill", "one token", "GB"]]
    for row in rows:
        line = [f"{row.contender}, {'warm' if row.warm else 'cold'}"]
        beside = plain.get(row.warm)
        for name in ("first", "second"):
            seconds = getattr(row, name).seconds
            ratio = f" ({seconds / getattr(beside, name).seconds:.2f}x)" if beside else ""
            line.append(f"{seconds:.1f}{ratio}")
        line += [f"{getattr(row.first, one):.1f} + {getattr(row.second, one):.1f}" for one in parts]
        line += [f"{row.prefill * 1e3:.2f}", f"{row.decode * 1e3:.2f}", f"{row.peak:.2f}"]
        lines.append(line)
    return lines


def flat(row: Row) -> dict[str, Any]:
    """Give a row as a record has it: parts of both calls together, and apart."""
    parts = {
        name: getattr(row.first, name) + getattr(row.second, name)
        for name in ("dynamo", "passes", "inner", "kernels")
    }
    apart = {"first_parts": asdict(row.first), "second_parts": asdict(row.second)}
    calls = {"first": row.first.seconds, "second": row.second.seconds}
    return asdict(row) | parts | calls | apart


def calls_cells(times: dict[str, dict[str, float]]) -> list[list[str]]:
    """Lay the contenders' calls beside those of the last, in milliseconds."""
    lines = [["milliseconds", *times]]
    for what in ("prefill", "decode"):
        took = [one[what] for one in times.values()]
        lines.append([what, *(f"{one * 1e3:.3f} ({one / took[-1]:.3f}x)" for one in took)])
    return lines


if __name__ == "__main__":
    main()

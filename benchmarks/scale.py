"""Measure how cost grows with tokens, experts, layers and batch: one exponent for each.

    python -m benchmarks.scale --axis tokens,experts,layers,batch --json FILE

Small Qwen3-MoE models with random weights in float32, one size growing by factors of two, the
others as they are in `BASE`. Contenders take turns in each place; medians. The exponent is the
slope of a straight line through the logarithms, with its standard error: 1 is in proportion, 0 is
free. `tokens`, `experts` and `layers` are those of a prefill, `batch` that of one decoding step's
tokens, each from another sequence. What differs from eager by more than rounding fails.
"""

import argparse
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch._dynamo import reset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.timing import machine, stamp, table, take_turns

BASE = {"tokens": 128, "experts": 16, "layers": 2, "batch": 1}
AXES = {
    "tokens": (32, 64, 128, 256, 512, 1024),
    "experts": (8, 16, 32, 64, 128),
    "layers": (1, 2, 4, 8),
    "batch": (1, 2, 4, 8, 16, 32),
}
SIZES: dict[str, Any] = {
    "hidden_size": 256, "moe_intermediate_size": 128, "num_experts_per_tok": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "use_cache": False,
    "vocab_size": 512,
}  # fmt: skip
TOLERANCE = 1e-5
"""Of the norm, float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A cost that is about `scale * size ** exponent`."""

    exponent: float
    error: float
    """The exponent's standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender along one axis."""

    contender: str
    axis: str
    sizes: tuple[int, ...]
    milliseconds: tuple[float, ...]
    exponent: float
    spread: tuple[float, float]
    """Of the exponent: one standard error to both sides."""
    last_milliseconds: float
    """At the largest size."""
    wrong: str = ""


def main() -> int:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--axis", default=",".join(AXES), help=f"of {[*AXES]}")
    parser.add_argument("--most", type=int, default=1 << 20, help="the largest size of an axis")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender and size")
    parser.add_argument("--inner", default="inductor", help="compiles what is not MoE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch._dynamo")
    torch._inductor.config.compile_threads = 1  # its pool would work beside what is timed
    print(machine())
    rows: list[Row] = []
    for axis in arguments.axis.split(","):
        sizes = [size for size in AXES[axis] if size <= arguments.most]
        rows += measure(axis, sizes, arguments.seconds, arguments.inner)
    if arguments.json:
        record = {**stamp(), "base": BASE, "results": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row.wrong and row.contender == "moecc" for row in rows))


def measure(axis: str, sizes: Sequence[int], seconds: float, inner: str) -> Iterator[Row]:
    """Time all contenders at every size of an axis, and print a line for each."""
    taken: dict[str, list[float]] = {}
    wrong: dict[str, str] = {}
    for size in sizes:
        calls = make(BASE | {axis: size}, axis, inner)
        with torch.inference_mode():
            expected = next(iter(calls.values()))(0)
            for name, call in calls.items():
                error = float((call(0) - expected).norm() / expected.norm())
                if not error <= TOLERANCE:
                    wrong[name] = f"differs from eager by {error:.1e} at {axis} {size}"
            times = take_turns(calls, seconds=seconds)
        for name, one in times.items():
            taken.setdefault(name, []).append(statistics.median(one) * 1e3)
        reset()
    lines = [[axis, *map(str, sizes), "exponent"]]
    for name, milliseconds in taken.items():
        found = fit(sizes, milliseconds)
        lines.append([name, *(f"{one:.2f}" for one in milliseconds)])
        lines[-1].append(wrong.get(name) or f"{found.exponent:.2f} ±{found.error:.2f}")
        yield Row(
            contender=name,
            axis=axis,
            sizes=tuple(sizes),
            milliseconds=tuple(milliseconds),
            exponent=found.exponent,
            spread=(found.exponent - found.error, found.exponent + found.error),
            last_milliseconds=milliseconds[-1],
            wrong=wrong.get(name, ""),
        )
    print(f"\n{table(lines)}", flush=True)


def make(sizes: dict[str, int], axis: str, inner: str) -> dict[str, Callable[[int], Any]]:
    """Name the ways to run a model of these sizes, eager first; weights are shared."""
    config = Qwen3MoeConfig(
        num_hidden_layers=sizes["layers"], num_experts=sizes["experts"], **SIZES
    )
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(config).eval()
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    twin: Any = deepcopy(model, shared)  # moecc adopts the modules that it compiles
    shape = (sizes["batch"], 1) if axis == "batch" else (1, sizes["tokens"])
    ids = torch.randint(SIZES["vocab_size"], shape)
    ours = torch.compile(twin, backend="moecc", options={"inner": inner})

    def run(call: Callable[..., Any], implementation: str, _: int) -> Any:
        model.config._experts_implementation = implementation
        return call(ids).logits

    forms = {f"transformers {name}": partial(run, model, name) for name in ("eager", "grouped_mm")}
    return {**forms, "moecc": partial(run, ours, "eager")}


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Fit the exponent by least squares of logarithms."""
    x, y = ([math.log(one) for one in values] for values in (sizes, costs))
    slope, intercept = statistics.linear_regression(x, y)
    residuals = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    free = len(x) - 2
    return Fit(exponent=slope, error=math.sqrt(residuals / free / spread) if free > 0 else 0.0)


if __name__ == "__main__":
    sys.exit(main())

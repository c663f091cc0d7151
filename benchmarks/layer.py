"""Time one MoE layer: transformers, eager and compiled, onnxruntime, kt-kernel, and moecc.

    python -m benchmarks.layer --shape qwen3-30b-a3b --dtype bf16,fp32 --tokens 1,64,256

Contenders are called in turn, each call with another routing, so that weights come from memory.
What differs from eager by more than rounding has no time, and exit status is 1 if that is moecc.
The floor is the larger of the active experts' bytes over the measured read bandwidth and the FLOPs
over the measured float32 product rate; `of floor` is the floor over the contender's time.
"""

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks import kt_layer, onnx_layer
from benchmarks.swiglu import swiglu_spec
from benchmarks.timing import (
    machine,
    narrow_to,
    product_rate,
    read_bandwidth,
    stamp,
    table,
    take_turns,
)
from moecc.codegen.native.emit import emit

SHAPES = {
    "qwen3-30b-a3b": {"hidden": 2048, "intermediate": 768, "experts": 128, "active": 8},
    "olmoe-1b-7b": {"hidden": 2048, "intermediate": 1024, "experts": 64, "active": 8},
    "mixtral-8x7b": {"hidden": 4096, "intermediate": 14336, "experts": 8, "active": 2},
    "deepseek-v2-lite": {"hidden": 2048, "intermediate": 1408, "experts": 64, "active": 6},
    "small": {"hidden": 256, "intermediate": 128, "experts": 16, "active": 4},
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest difference from eager, relative to the norm, that is rounding."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
SPINNING = {"onnxruntime": (torch.float32, onnx_layer), "kt-kernel": (torch.bfloat16, kt_layer)}
"""Peers with threads of their own, which wait for work a while after a call, and their dtypes."""
SETTLE = 0.03
"""Seconds between contenders where such a peer takes part; a call that is not timed follows."""
GATHER_LIMIT = 4e9
"""Bytes of weights that `batched_mm` may copy for one call."""
INPUTS = 8

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One contender at one dtype and token count."""

    contender: str
    dtype: str
    tokens: int
    milliseconds: float | None
    """None where the output is wrong."""
    spread: tuple[float, float] | None = None
    floor_milliseconds: float
    ratio: float | None
    """Its time over that of moecc's kernel."""
    wrong: str = ""


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="qwen3-30b-a3b")
    parser.add_argument("--dtype", default="bf16,fp32", help="of bf16, fp16, fp32")
    parser.add_argument("--tokens", default="1,64,256")
    parser.add_argument("--only", default="", help="contenders to run, by a part of their names")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contender")
    parser.add_argument("--isa", choices=["avx2"], help="hold everything to this instruction set")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    narrow_to(arguments.isa)
    warnings.filterwarnings("ignore", module="torch._dynamo")
    # Inductor's pool of compile processes starts at the first compile and would work beside us.
    torch._inductor.config.compile_threads = 1
    print(machine())
    bandwidth, rate = read_bandwidth(), product_rate()
    print(f"reads {bandwidth / 1e9:.1f} GB/s, float32 products {rate / 1e9:.0f} GFLOP/s")
    results: list[Result] = []
    for dtype in arguments.dtype.split(","):
        layer = make_layer(SHAPES[arguments.shape], DTYPES[dtype])
        for tokens in map(int, arguments.tokens.split(",")):
            results += measure(layer, dtype, tokens, arguments, bandwidth, rate)
        del layer
    if arguments.json:
        record = {**stamp(), "shape": arguments.shape, "bandwidth": bandwidth}
        record |= {"product_rate": rate, "results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    if any(result.wrong and result.contender.startswith("moecc") for result in results):
        sys.exit(1)


def make_layer(shape: dict[str, int], dtype: torch.dtype) -> Qwen3MoeExperts:
    """Build the experts of one layer with random weights."""
    config = Qwen3MoeConfig(
        hidden_size=shape["hidden"],
        moe_intermediate_size=shape["intermediate"],
        num_experts=shape["experts"],
        num_experts_per_tok=shape["active"],
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = Qwen3MoeExperts(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    for parameter in layer.parameters():
        for expert in parameter:  # one at a time: no second copy of the layer
            expert.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


def make_inputs(layer: Qwen3MoeExperts, tokens: int) -> list[Batch]:
    """Make hidden states and the routing of real top-k form."""
    dtype, active = layer.down_proj.dtype, layer.config.num_experts_per_tok
    inputs: list[Batch] = []
    for _ in range(INPUTS):
        hidden = torch.randn(tokens, layer.hidden_dim).to(dtype)
        scores = torch.randn(tokens, layer.num_experts).softmax(-1)
        weights, ids = scores.topk(active)
        inputs.append((hidden, ids, (weights / weights.sum(-1, keepdim=True)).to(dtype)))
    return inputs


def peers(
    layer: Qwen3MoeExperts, tokens: int, call: Callable[..., object]
) -> Iterator[tuple[str, Callable[..., object]]]:
    """Name transformers' implementations that can run so many tokens; `call` is what runs them."""
    gathered = (
        tokens * layer.config.num_experts_per_tok * sum(p[0].nbytes for p in layer.parameters())
    )
    for name in IMPLEMENTATIONS:
        if name != "batched_mm" or gathered <= GATHER_LIMIT:
            yield name, _with_implementation(layer, name, call)


def contenders(layer: Qwen3MoeExperts, tokens: int) -> Iterator[tuple[str, Callable[..., object]]]:
    """Name every way to run the layer; compiled ones compile at their first call."""
    yield from peers(layer, tokens, layer)
    for name, run in peers(layer, tokens, torch.compile(layer)):
        yield f"{name} + inductor", run
    for name, (dtype, peer) in SPINNING.items():
        if peer.installed() and layer.down_proj.dtype == dtype:
            sizes = layer.config.num_experts_per_tok, torch.get_num_threads()
            yield name, peer.build(layer.gate_up_proj, layer.down_proj, *sizes)
    yield "moecc kernel", _kernel(layer)
    # A twin with the same weights: moecc runs a module that it compiled with its own kernels
    # outside of Dynamo too, and would answer for the other contenders.
    twin = copy.copy(layer)
    twin.config = copy.copy(layer.config)
    yield "moecc", _with_implementation(twin, "eager", torch.compile(twin, backend="moecc"))


def _with_implementation(
    layer: Qwen3MoeExperts, name: str, call: Callable[..., object]
) -> Callable[..., object]:
    def run(*batch: torch.Tensor) -> object:
        layer.config._experts_implementation = name
        return call(*batch)

    return run


def _kernel(layer: Qwen3MoeExperts) -> Callable[..., torch.Tensor]:
    experts, hidden, intermediate = layer.down_proj.shape
    shape = {"hidden": hidden, "intermediate": intermediate, "experts": experts}
    run = emit(swiglu_spec(shape, layer.down_proj.dtype)).run
    return lambda hidden, ids, weights: run(
        hidden, ids, weights, layer.gate_up_proj, layer.down_proj, None, None, None
    )


def measure(
    layer: Qwen3MoeExperts,
    dtype: str,
    tokens: int,
    arguments: argparse.Namespace,
    bandwidth: float,
    rate: float,
) -> list[Result]:
    """Time all contenders at one token count and print the table."""
    inputs = make_inputs(layer, tokens)
    parts = [part for part in arguments.only.split(",") if part]
    calls = {
        name: lambda number, run=run: run(*inputs[number % INPUTS])
        for name, run in contenders(layer, tokens)
        if not parts or any(part in name for part in parts)
    }
    torch._dynamo.reset()
    with torch.inference_mode():
        wrong = check(calls, _with_implementation(layer, "eager", layer)(*inputs[0]))
        right = {name: call for name, call in calls.items() if name not in wrong}
        between = partial(time.sleep, SETTLE) if SPINNING.keys() & right.keys() else None
        times = take_turns(right, seconds=arguments.seconds, between=between)
    expert = sum(parameter[0].nbytes for parameter in layer.parameters())
    active = sum(ids.unique().numel() for _, ids, _ in inputs) / INPUTS
    slots = tokens * layer.config.num_experts_per_tok
    flops = 2 * slots * sum(parameter[0].numel() for parameter in layer.parameters())
    memory, compute = active * expert / bandwidth, flops / rate
    floor = max(memory, compute)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    ours = medians.get("moecc kernel", float("nan"))
    results = [
        Result(
            contender=name,
            dtype=dtype,
            tokens=tokens,
            milliseconds=took * 1e3,
            spread=(min(times[name]) * 1e3, max(times[name]) * 1e3),
            floor_milliseconds=floor * 1e3,
            ratio=took / ours if "moecc kernel" in medians else None,
        )
        for name, took in medians.items()
    ]
    print(
        f"\n{dtype}, {tokens} tokens, {active:.0f} experts active: floor {floor * 1e3:.2f} ms "
        f"(memory {memory * 1e3:.2f}, float32 products {compute * 1e3:.2f})"
    )
    rows = [["contender", "ms", "vs kernel", "of floor"]]
    for name, took in medians.items():
        rows.append([name, f"{took * 1e3:.3f}", f"{took / ours:.2f}x", f"{floor / took:.0%}"])
    print(table(rows), flush=True)
    for name, why in wrong.items():
        print(f"{name}: {why}")
        empty = {"milliseconds": None, "ratio": None, "floor_milliseconds": floor * 1e3}
        results.append(Result(contender=name, dtype=dtype, tokens=tokens, wrong=why, **empty))
    return results


def check(calls: dict[str, Callable[[int], Any]], expected: torch.Tensor) -> dict[str, str]:
    """Say of each contender whose output for the first input is not as expected by how much."""
    wrong: dict[str, str] = {}
    for name, call in calls.items():
        found = call(0)
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        if not error <= TOLERANCE[expected.dtype]:
            wrong[name] = f"differs from eager by {error:.1e} of the norm"
    return wrong


if __name__ == "__main__":
    main()

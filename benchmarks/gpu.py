"""Time the Triton kernels of one MoE layer on this GPU, beside transformers' and vLLM's.

    python -m benchmarks.gpu --shape qwen3-30b-a3b --weights bf16,int4 --tokens 1,16,64,1024,4096

Contenders are called in turn, each call with another routing; medians of device time. Every output
is compared with the torch definition first: exit status 1 if one is off. Rates are those of the
bytes and FLOPs that the layer cannot do without, beside what a copy and a large product reach here.
`--plans` times every plan, also those that the cost expression did not choose. vLLM takes part
where it is installed (`pip install vllm`).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.layer import SHAPES, Batch, make_layer, peers
from benchmarks.static_gpu import make_spec
from benchmarks.static_traffic import flops, launches
from benchmarks.timing import table
from moecc.codegen import low_bit, reference
from moecc.codegen.gpus import gpu_of
from moecc.codegen.triton_costs import choose_plan, plans
from moecc.codegen.triton_emitter import emit

INPUTS = 8
ROUNDS = 50
TOLERANCE = 2e-2
"""Relative to the norm: bfloat16 rounds between the products and before the sum."""
Call = Callable[..., torch.Tensor]
Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender at one number of bits and of tokens."""

    contender: str
    weights: str
    tokens: int
    microseconds: float
    error: float
    """Relative to the norm of the definition's output."""
    teraflops: float
    of_products: float
    """Of what a large product reaches."""
    gigabytes: float
    """A second."""
    of_bandwidth: float
    """Of what a copy reaches."""


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="qwen3-30b-a3b")
    parser.add_argument("--weights", default="bf16,int4", help="bf16 or a scheme")
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096")
    parser.add_argument("--plans", action="store_true", help="time every plan")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device; benchmarks.static_gpu does not")
    device = torch.device("cuda")
    bandwidth, rate = copy_rate(device), product_rate(device)
    name = torch.cuda.get_device_name()
    print(f"{name}: copies {bandwidth / 1e9:.0f} GB/s, products {rate / 1e12:.0f} TFLOP/s")
    rows: list[Row] = []
    for weights in given.weights.split(","):
        for tokens in map(int, given.tokens.split(",")):
            shape = SHAPES[given.shape]
            rows += measure(shape, weights, tokens, device, bandwidth, rate, every=given.plans)
    if given.json:
        record = {"device": name, "shape": given.shape, "bandwidth": bandwidth}
        record |= {"product_rate": rate, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(record, indent=2) + "\n")
    if any(row.error > TOLERANCE for row in rows):
        sys.exit(1)


def measure(
    shape: Mapping[str, int],
    weights: str,
    tokens: int,
    device: torch.device,
    bandwidth: float,
    rate: float,
    *,
    every: bool = False,
) -> list[Row]:
    """Check and time all contenders, and print the table."""
    layer = make_layer(dict(shape), torch.bfloat16).to(device)
    ours, definition = kernels(shape, weights, tokens, device, layer, every)
    batches = [make_batch(shape, tokens, device) for _ in range(INPUTS)]
    contenders = ours
    if weights == "bf16":
        contenders = ours | dict(transformers_peers(layer, tokens)) | dict(vllm_peer(layer))
    with torch.inference_mode():
        expected = definition(*batches[0]).float()
        errors = {
            name: float((run(*batches[0]).float() - expected).norm() / expected.norm())
            for name, run in contenders.items()
        }
        times = device_times(contenders, batches, device)
    spec = make_spec(weights, shape)
    bits = spec.schemes.first.bits_per_weight if spec.schemes else 16
    work, least = flops(shape, tokens), launches("minimum", shape, tokens, bits)[0].bytes
    rows = [
        Row(
            contender=name,
            weights=weights,
            tokens=tokens,
            microseconds=took * 1e6,
            error=errors[name],
            teraflops=work / took / 1e12,
            of_products=work / took / rate,
            gigabytes=least / took / 1e9,
            of_bandwidth=least / took / bandwidth,
        )
        for name, took in times.items()
    ]
    lines = [[f"{weights}, T={tokens}", "us", "error", "TFLOP/s", "of peak", "GB/s", "of peak"]]
    for row in rows:
        lines.append([row.contender, f"{row.microseconds:.1f}", f"{row.error:.0e}"])
        lines[-1] += [f"{row.teraflops:.1f}", f"{row.of_products:.0%}"]
        lines[-1] += [f"{row.gigabytes:.0f}", f"{row.of_bandwidth:.0%}"]
    print("\n" + table(lines), flush=True)
    return rows


def kernels(
    shape: Mapping[str, int],
    weights: str,
    tokens: int,
    device: torch.device,
    layer: torch.nn.Module,
    every: bool,
) -> tuple[dict[str, Call], Call]:
    """Give moecc's kernel, or one for every plan, and the definition, on a layer's weights."""
    spec = make_spec(weights, shape)
    held: Tensors = (layer.gate_up_proj, layer.down_proj, None, None, None, None)
    if spec.schemes is not None:
        held = low_bit.packed_tensors(make_spec("bf16", shape), spec.schemes, held)
    gpu, active = gpu_of(device), shape["active"]
    chosen = choose_plan(spec, gpu, tokens, active)
    found = {f"moecc, {chosen}": emit(spec, chosen).run}
    if every:
        found |= {f"moecc, {one}": emit(spec, one).run for one in plans(spec, gpu, active)}
    return {name: _on(run, held) for name, run in found.items()}, _on(
        reference.emit(spec).run, held
    )


def _on(run: Call, held: Tensors) -> Call:
    return lambda hidden, ids, shares: run(hidden, ids, shares, *held)


def make_batch(shape: Mapping[str, int], tokens: int, device: torch.device) -> Batch:
    """Make hidden states, ids and weights of a random router."""
    scores = torch.randn(tokens, shape["experts"], device=device).softmax(-1)
    shares, ids = scores.topk(shape["active"])
    hidden = torch.randn(tokens, shape["hidden"], device=device, dtype=torch.bfloat16)
    return hidden, ids, shares / shares.sum(-1, keepdim=True)


def transformers_peers(layer: torch.nn.Module, tokens: int) -> Iterator[tuple[str, Call]]:
    """Name transformers' implementations, plain and compiled by inductor."""
    for suffix, call in (("", layer), (" + inductor", torch.compile(layer))):
        for name, run in peers(layer, tokens, call):
            yield name + suffix, lambda x, ids, shares, run=run: run(x, ids, shares.to(x.dtype))


def vllm_peer(layer: torch.nn.Module) -> Iterator[tuple[str, Call]]:
    """Name vLLM's kernels, where it is installed."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts  # pyright: ignore
    except ImportError:
        print("vLLM is not here: pip install vllm")
        return
    first, second = layer.gate_up_proj, layer.down_proj
    yield (
        "vLLM fused_experts",
        lambda x, ids, shares: fused_experts(x, first, second, shares, ids.int()),
    )


def device_times(
    contenders: Mapping[str, Call], batches: list[Batch], device: torch.device
) -> dict[str, float]:
    """Take the median seconds of each, contenders in turn."""
    for run in contenders.values():
        for batch in batches[:3]:
            run(*batch)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS):
        batch = batches[number % INPUTS]
        for name, run in contenders.items():
            taken[name].append(_once(partial(run, *batch), device))
    return {name: statistics.median(times) for name, times in taken.items()}


def _once(call: Callable[[], object], device: torch.device) -> float:
    """Time one call: by the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_rate(device: torch.device) -> float:
    """Measure bytes a second of a large copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_once(lambda: target.copy_(source), device) for _ in range(20))


def product_rate(device: torch.device) -> float:
    """Measure FLOPs a second of an 8192^3 product in bfloat16."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / min(_once(lambda: a @ b, device) for _ in range(20))


if __name__ == "__main__":
    main()

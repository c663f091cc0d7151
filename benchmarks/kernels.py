"""Time the CPU kernels of one MoE layer beside transformers' and llama.cpp's.

    python -m benchmarks.kernels --shape qwen3-30b-a3b --kind bf16,int8,int4 --tokens 1,8,64,512

The floor is the larger of two times: that of a plain read of as many bytes as the active experts
have, and that of as many FLOPs in float32 `torch.mm`; integer products can go below it. Both are
timed in turn with the kernels, as what they get changes from minute to minute on a shared machine.
transformers' contenders are its eager ones at the same dtype, beside low-bit kernels at bf16.
llama.cpp's kernels are `benchmarks/ggml.py` (`pip install moecc[llama]`), without its repacking
of weights at load time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks import dispatch, ggml, roofline
from benchmarks.layer import DTYPES, SHAPES, make_layer, peers
from benchmarks.swiglu import swiglu_spec
from benchmarks.timing import (
    PRODUCT,
    alternate,
    machine,
    narrow_to,
    plain_product,
    plain_read,
    stamp,
    table,
)
from moecc.codegen.native.call import plain
from moecc.codegen.native.emit import emit
from moecc.codegen.spec import KernelSpec
from moecc.runtime.schemes.packing import pack_experts
from moecc.runtime.schemes.scheme import SCHEMES, Schemes

INPUTS = 8
MOST = 40
"""Timed calls of a contender."""
SETTLE = 0.03
"""Seconds between contenders, whose threads spin for a while after a call."""
Call = Callable[..., object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to run the layer, and the bytes of an expert that it reads."""

    run: Call
    size: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender at one number of bits and of tokens."""

    contender: str
    kind: str
    tokens: int
    milliseconds: float
    busy_milliseconds: float | None
    """With another process computing on one core."""
    floor_milliseconds: float
    """Of this number of bits: peers in other dtypes have another one."""
    gigabytes: float
    """Of the active experts, as this contender stores them."""
    gigaflops: float
    """Floating-point operations, in units of 10^9: not a rate."""
    bandwidth: float
    """Bytes a second of a plain read of so many, timed in turn with this."""
    product_rate: float
    """Floating-point operations a second of `torch.mm`, timed in turn with this."""
    of_bandwidth: float
    """Bytes of active experts over the time, of what a plain read gets."""
    of_products: float
    """FLOPs over the time, of what float32 products get."""


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="qwen3-30b-a3b")
    parser.add_argument("--kind", default="bf16,int8,int4,mxfp4", help=f"of {[*DTYPES, *SCHEMES]}")
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contender")
    parser.add_argument("--busy", action="store_true", help="also with a busy process beside")
    parser.add_argument("--isa", choices=["avx2"], help="hold everything to this instruction set")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the roofline")
    arguments = parser.parse_args()
    narrow_to(arguments.isa)
    if arguments.plot:
        roofline.require()
    print(machine())
    call = dispatch.measure()
    print(dispatch.describe(call))
    if not ggml.installed():
        print("llama.cpp is not here: pip install moecc[llama]")
    rows: list[Row] = []
    record: dict[str, object] = {**stamp(), "shape": arguments.shape}
    record["dispatch_microseconds"] = call.cost
    for kind in arguments.kind.split(","):
        rows += measure(kind, arguments)
        for roof in ("bandwidth", "product_rate"):
            record[roof] = statistics.median(getattr(row, roof) for row in rows)
        record["results"] = [asdict(row) for row in rows]
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")
        if arguments.plot:
            roofline.draw(record, arguments.plot)


def measure(kind: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Time all contenders at one number of bits, and print the table."""
    shape = SHAPES[arguments.shape]
    weights = random_weights(shape)
    ours = our_kernel(kind, shape, weights)
    layer = make_layer(shape, DTYPES.get(kind, torch.bfloat16))
    theirs = None
    if ggml.installed() and kind in ggml.TYPES:
        theirs = ggml.Layer(*weights, kind, torch.get_num_threads())

    def settle() -> None:
        if theirs is not None:
            theirs.rest()
        time.sleep(SETTLE)

    print(f"\n{kind}, {ours.size / 1e6:.2f} MB an expert")
    lines = [["", "ms", "of floor", "of read", "x products", *(["busy"] * arguments.busy)]]
    for tokens in map(int, arguments.tokens.split(",")):
        batches = [make_batch(shape, tokens) for _ in range(INPUTS)]
        contenders = {"moecc": ours}
        if theirs is not None:
            graph = theirs.graph(tokens, shape["active"])
            contenders[f"ggml {ggml.NAMES[kind]}"] = Contender(run=graph, size=ours.size)
        kernels = [*contenders]  # of these also the time with a busy process beside
        contenders |= transformers_peers(layer, tokens)
        active = sum(ids.unique().numel() for _, ids, _ in batches) / INPUTS
        flops = 6 * tokens * shape["active"] * shape["hidden"] * shape["intermediate"]
        timed = {name: _on(batches, one.run) for name, one in contenders.items()}
        timed |= {"read": plain_read(int(active * ours.size)), "mm": plain_product()}
        with torch.inference_mode():
            times = alternate(timed, seconds=arguments.seconds, most=MOST, between=settle)
            busy: dict[str, float] = {}
            if arguments.busy:
                beside = {name: timed[name] for name in kernels}
                with busy_process():
                    busy = alternate(beside, seconds=arguments.seconds, most=MOST, between=settle)
        bandwidth, rate = active * ours.size / times["read"], PRODUCT / times["mm"]
        floor = max(times["read"], flops / rate)
        for name, one in contenders.items():
            took, read = times[name], active * one.size
            row = Row(
                contender=name,
                kind=kind,
                tokens=tokens,
                milliseconds=took * 1e3,
                busy_milliseconds=busy[name] * 1e3 if name in busy else None,
                floor_milliseconds=floor * 1e3,
                gigabytes=read / 1e9,
                gigaflops=flops / 1e9,
                bandwidth=bandwidth,
                product_rate=rate,
                of_bandwidth=read / took / bandwidth,
                of_products=flops / took / rate,
            )
            lines.append([f"T={tokens} {name}", f"{took * 1e3:.2f}", f"{floor / took:.0%}"])
            lines[-1] += [f"{row.of_bandwidth:.0%}", f"{row.of_products:.2f}"]
            if busy:
                lines[-1].append(f"{busy[name] / took:.2f}x" if name in busy else "")
            yield row
        roofs = [f"{bandwidth / 1e9:.1f} GB/s", f"{rate / 1e9:.0f} GFLOP/s"]
        lines.append([f"T={tokens} roofs", "", "", *roofs, *([""] * arguments.busy)])
    print(table(lines), flush=True)


def transformers_peers(layer: Qwen3MoeExperts, tokens: int) -> dict[str, Contender]:
    """Name transformers' implementations, each with the dtype that it reads."""
    dtype = layer.down_proj.dtype
    label = next(name for name, kind in DTYPES.items() if kind == dtype)
    size = sum(parameter[0].nbytes for parameter in layer.parameters())

    def in_dtype(run: Call) -> Call:
        return lambda hidden, ids, shares: run(hidden.to(dtype), ids, shares.to(dtype))

    return {
        f"{name} {label}": Contender(run=in_dtype(run), size=size)
        for name, run in peers(layer, tokens, layer)
    }


def _on(batches: list[tuple[torch.Tensor, ...]], run: Call) -> Callable[[int], object]:
    return lambda number: run(*batches[number % len(batches)])


def random_weights(shape: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """Make gate, up [E, I, H] and down [E, H, I]: one expert's values, seen E times."""
    experts, inner, outer = shape["experts"], shape["intermediate"], shape["hidden"]
    sizes = ((inner, outer), (inner, outer), (outer, inner))
    return tuple((torch.randn(size) * size[1] ** -0.5).expand(experts, *size) for size in sizes)


def our_kernel(kind: str, shape: dict[str, int], weights: tuple[torch.Tensor, ...]) -> Contender:
    """Give moecc's kernel with its own copy of the weights."""
    held = our_weights(kind, weights)
    size = sum(one.nbytes for one in held) / shape["experts"]
    return Contender(run=our_call(our_spec(kind, shape), held), size=size)


def our_spec(kind: str, shape: dict[str, int]) -> KernelSpec:
    """Say what moecc's kernel computes."""
    scheme = SCHEMES.get(kind)
    dtype = torch.float32 if scheme else DTYPES[kind]
    schemes = Schemes(first=scheme, second=scheme) if scheme else None
    return swiglu_spec(shape, dtype, split=True, schemes=schemes)


def our_weights(kind: str, weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Give gate, up and down as moecc's kernel reads them, in memory of their own."""
    if kind in DTYPES:
        return tuple(one.to(DTYPES[kind]).contiguous() for one in weights)
    # All experts have the values of the first: one is packed.
    packed = (pack_experts(one[:1], SCHEMES[kind]) for one in weights)
    return tuple(one.repeat(len(weights[0]), 1) for one in packed)


def our_call(spec: KernelSpec, held: tuple[torch.Tensor, ...]) -> Call:
    """Build moecc's kernel, for weights that it reads."""
    run, (gate, up, down) = emit(spec).run, held

    def call(hidden: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        return run(plain(hidden, spec.dtype), ids, shares, gate, down, None, None, up)

    return call


def make_batch(shape: dict[str, int], tokens: int) -> tuple[torch.Tensor, ...]:
    """Make hidden states, ids and weights of a random router."""
    shares, ids = torch.randn(tokens, shape["experts"]).softmax(-1).topk(shape["active"])
    return torch.randn(tokens, shape["hidden"]), ids, shares / shares.sum(-1, keepdim=True)


@contextmanager
def busy_process() -> Iterator[None]:
    """Let another process compute on one core meanwhile."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


if __name__ == "__main__":
    main()

"""Time a whole decoder: transformers, eager and compiled, moecc, and llama.cpp at the same bits.

    python -m benchmarks.decoder --kind bf16,int8,int4 --prompt 512 --steps 32 --json FILE

Layers of Qwen3-30B-A3B's shape with attention, a vocabulary of 32000 and random weights. All
experts have the values of the first, in memory of their own: quantizing each would take longer than
the benchmark. Within a kind contenders take turns, each with the whole prompt and then token by
token, always the most likely one; medians. moecc and llama.cpp have all matrices in the kind's
bits, or with `--rest bf16` only experts; routers and norms have more.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, StaticCache

from benchmarks import llama_cpp
from benchmarks.llama_cpp import Generated
from benchmarks.timing import machine, narrow_to, read_bandwidth, stamp, table
from moecc.codegen import low_bit
from moecc.runtime.schemes.packing import pack_experts
from moecc.runtime.schemes.scheme import Scheme

KINDS = ("bf16", "int8", "int4")
SETTLE = 0.3
"""Seconds between contenders: llama.cpp's threads spin a while after a call."""
Run = Callable[[Sequence[int], int], Generated]
"""Go on after a prompt with so many tokens, always the most likely one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender at one kind."""

    contender: str
    kind: str
    prompt: int
    prefill_rate: float
    """Prompt tokens a second."""
    decode_rate: float
    """Tokens a second."""
    prefill_ratio: float
    """moecc's rate over this one."""
    decode_ratio: float


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", default="bf16,int8,int4", help=f"of {[*KINDS]}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--steps", type=int, default=32, help="tokens after the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rest", choices=["bf16"], help="matrices that no expert has")
    parser.add_argument(
        "--profile", action="store_true", help="say what moecc's decode is spent on"
    )
    parser.add_argument("--isa", choices=["avx2"], help="hold torch and moecc to this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    narrow_to(arguments.isa)
    prepare_torch()
    torch._inductor.config.cpp.enable_kernel_profile = arguments.profile  # names fused loops
    if not llama_cpp.installed():
        print("llama.cpp is not here: pip install moecc[llama]")
    bandwidth = read_bandwidth()
    print(f"{machine()}\nreads {bandwidth / 1e9:.1f} GB/s", flush=True)
    record: dict[str, Any] = {**stamp(), "bandwidth": bandwidth}
    record |= {name: getattr(arguments, name) for name in ("layers", "steps", "rounds", "rest")}
    rows: list[Row] = []
    model = make_model(arguments.layers)
    prompt = torch.randint(model.config.vocab_size, (arguments.prompt,)).tolist()
    for kind in arguments.kind.split(","):
        with contenders(model, kind, arguments.prompt + arguments.steps, arguments.rest) as runs:
            rows += measure(runs, kind, prompt, arguments.steps, arguments.rounds)
            if arguments.profile:
                print(f"\n{profile(runs['moecc'], prompt[0], arguments.steps)}", flush=True)
        record["results"] = [asdict(row) for row in rows]
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def prepare_torch() -> None:
    """Let each contender compile its graphs here, and keep them all."""
    warnings.filterwarnings("ignore", module="torch._dynamo")
    torch._dynamo.config.recompile_limit = 64  # contenders share the code of one model
    torch._inductor.config.compile_threads = 1


def make_model(layers: int, **sizes: int) -> Qwen3MoeForCausalLM:
    """Make a decoder in bf16 with random weights; sizes that are not given are Qwen3-30B-A3B's."""
    defaults = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}
    defaults |= {"num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4}
    defaults |= {"head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 4096}
    config = Qwen3MoeConfig(num_hidden_layers=layers, norm_topk_prob=True, **(defaults | sizes))
    config._experts_implementation = "grouped_mm"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with mock.patch.object(Qwen3MoeForCausalLM, "init_weights"):
            model = Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            parameter[0].normal_(std=parameter.shape[-1] ** -0.5)
            parameter[1:] = parameter[0]
        elif parameter.dim() == 2:
            parameter.normal_(std=1 if "embed" in name else parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(1)
    return model


@contextmanager
def contenders(
    model: Qwen3MoeForCausalLM, kind: str, context: int, rest: str | None
) -> Iterator[dict[str, Run]]:
    """Name every way to run the model at a kind, moecc's first; weights are shared."""
    ours = {} if kind == "bf16" else {"quantize": kind, "dense_linears": "auto" if rest else kind}
    runs = {"moecc": _decoder(model, context, torch.compile, backend="moecc", options=ours)}
    runs["transformers bf16 + inductor"] = _decoder(model, context, torch.compile)
    if kind == "bf16":
        runs["transformers bf16"] = _decoder(model, context, lambda forward: forward)
    with tempfile.TemporaryDirectory() as folder, packing_the_first():
        if kind != "bf16" and llama_cpp.installed():
            experts = llama_cpp.TYPES[kind]
            others = llama_cpp.TYPES[rest or kind]
            file = llama_cpp.write(model, Path(folder) / "model.gguf", experts, others)
            name = f"llama.cpp {experts}" + (f", rest {others}" if rest else "")
            runs[name] = llama_cpp.Decoder(file, torch.get_num_threads(), context + 8).run
        yield runs
    torch._dynamo.reset()


def _decoder(
    model: Qwen3MoeForCausalLM, context: int, compiled: Callable[..., Any], **how: Any
) -> Run:
    """Run a twin of the model, which has its tensors: moecc adopts the modules that it compiles."""
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    call = compiled(twin.forward, **how)
    config = twin.config
    cache = StaticCache(config=config, max_cache_len=context)
    sizes = config.num_key_value_heads, config.head_dim
    cache.early_initialization(1, *sizes, dtype=twin.dtype, device=twin.device)

    @torch.inference_mode()
    def run(prompt: Sequence[int], steps: int) -> Generated:
        cache.reset()
        times, given = [time.perf_counter()], [torch.tensor([prompt])]
        for _ in range(steps):
            logits = call(input_ids=given[-1], past_key_values=cache, logits_to_keep=1).logits
            given.append(logits[:, -1].argmax(-1, keepdim=True))
            times.append(time.perf_counter())
        return Generated(
            prefill=times[1] - times[0],
            token=(times[-1] - times[1]) / (steps - 1),
            tokens=tuple(int(one) for one in given[1:]),
        )

    return run


@contextmanager
def packing_the_first() -> Iterator[None]:
    """Pack one expert and repeat it where all are alike."""

    def pack(
        experts: torch.Tensor, scheme: Scheme, *importance: torch.Tensor | None
    ) -> torch.Tensor:
        if not llama_cpp.alike(experts):
            return pack_experts(experts, scheme, *importance)
        return pack_experts(experts[:1], scheme, *importance).repeat(len(experts), 1)

    with mock.patch.object(low_bit, "pack_experts", pack):
        yield


def measure(
    runs: Mapping[str, Run], kind: str, prompt: Sequence[int], steps: int, rounds: int
) -> list[Row]:
    """Let contenders take turns and print their medians."""
    taken: dict[str, list[Generated]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            time.sleep(SETTLE)
            generated = run(prompt, steps if number else 3)
            if number:  # the first compiles
                taken[name].append(generated)
    medians = {
        name: (
            statistics.median(one.prefill for one in times),
            statistics.median(one.token for one in times),
        )
        for name, times in taken.items()
    }
    first = medians["moecc"]
    rows = [
        Row(
            contender=name,
            kind=kind,
            prompt=len(prompt),
            prefill_rate=len(prompt) / prefill,
            decode_rate=1 / token,
            prefill_ratio=prefill / first[0],
            decode_ratio=token / first[1],
        )
        for name, (prefill, token) in medians.items()
    ]
    lines = [[kind, "prefill tokens/s", "moecc over it", "decode tokens/s", "moecc over it"]]
    for row in rows:
        lines.append([row.contender, f"{row.prefill_rate:.1f}", f"{row.prefill_ratio:.2f}x"])
        lines[-1] += [f"{row.decode_rate:.2f}", f"{row.decode_ratio:.2f}x"]
    print(f"\n{table(lines)}", flush=True)
    return rows


def profile(run: Run, token: int, steps: int) -> str:
    """Tell what decoding is spent on: what takes at least one part in a hundred."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run([token], steps)
    events = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)
    whole = sum(one.self_cpu_time_total for one in events)
    lines = [["decode", "of the time", "us a call", "calls"]]
    for one in events:
        if one.self_cpu_time_total >= whole / 100:
            own = one.self_cpu_time_total
            lines.append([one.key[:70], f"{own / whole:.1%}", f"{own / one.count:.0f}"])
            lines[-1].append(str(one.count))
    return table(lines)


if __name__ == "__main__":
    main()

"""Put a whole model behind one call: prompts in, greedy tokens and the seconds that they took out.

Each contender runs in a process of its own (`Guest`), so that none compiles, adopts or allocates
for another, and its peak of memory is its own. Processes stay, are asked in turn, and are stopped
in between: threads of servers and of OpenMP spin for a while after a call.
"""

import multiprocessing
import os
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

from benchmarks import llama_cpp

Prompts = Sequence[Sequence[int]]
"""Of one length, [B, L]."""
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One call."""

    prefill: float
    """Seconds of the prompts and the first new token of each."""
    step: float
    """Seconds of each token after that, for all sequences together."""
    tokens: tuple[tuple[int, ...], ...]
    peak_memory: int = 0
    """Bytes that the process has had resident at most, so far."""


Run = Callable[[Prompts, int], Generation]
"""Go on after prompts with so many tokens; raises `Unable` saying why not."""


class Unable(Exception):
    """A contender cannot run this at all."""


def transformers(
    implementation: str, folder: Path, context: int, backend: str = "", inner: str = ""
) -> Run:
    """Run transformers' forward on a static cache, compiled if a backend is named."""
    from transformers import StaticCache

    warnings.filterwarnings("ignore", module="torch._dynamo")
    dynamo.recompile_limit = 64  # for prefill and decode at each batch
    model = _load(folder, experts_implementation=implementation)
    options: Any = {"inner": inner} if inner else None
    compiled = torch.compile(model.forward, backend=backend or "eager", options=options)
    call = compiled if backend else model.forward
    caches: dict[int, Any] = {}

    @torch.inference_mode()
    def run(prompts: Prompts, steps: int) -> Generation:
        if len(prompts) not in caches:
            cache = StaticCache(config=model.config, max_cache_len=context)
            heads = model.config.num_key_value_heads, model.config.head_dim
            cache.early_initialization(len(prompts), *heads, dtype=model.dtype, device=model.device)
            caches[len(prompts)] = cache
        cache = caches[len(prompts)]
        cache.reset()
        times, given = [time.perf_counter()], [torch.tensor(prompts)]
        for _ in range(steps):
            logits = call(input_ids=given[-1], past_key_values=cache, logits_to_keep=1).logits
            given.append(logits[:, -1].argmax(-1, keepdim=True))
            times.append(time.perf_counter())
        return Generation(
            prefill=times[1] - times[0],
            step=(times[-1] - times[1]) / (steps - 1),
            tokens=_tuples(torch.cat(given[1:], dim=1)),
        )

    return run


def _load(folder: Path, **how: Any) -> Any:
    models: Any = import_module("transformers")
    models.logging.disable_progress_bar()
    loaded = models.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    return loaded.eval()


def llama(folder: Path, context: int) -> Run:
    """Run llama.cpp's server on a file with the same float32 weights, one sequence."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        llama_cpp.write(_load(folder), file, "F32", "F32")
        decoder = llama_cpp.Decoder(file, torch.get_num_threads(), context + 8)

    def run(prompts: Prompts, steps: int) -> Generation:
        if len(prompts) > 1:
            raise Unable("xllamacpp's server is driven with one sequence here")
        made = decoder.run(prompts[0], steps)
        return Generation(prefill=made.prefill, step=made.token, tokens=(made.tokens,))

    return run


def vllm(folder: Path, context: int) -> Run:
    """Run vLLM's engine, with CUDA graphs and without its prefix cache."""
    engines: Any = import_module("vllm")
    engine = engines.LLM(
        model=str(folder), dtype="float32", max_model_len=context, enable_prefix_caching=False
    )

    def generate(prompts: Prompts, steps: int) -> list[list[int]]:
        how = engines.SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
        given = [engines.TokensPrompt(prompt_token_ids=list(one)) for one in prompts]
        made = engine.generate(given, how, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in made]

    return partial(_twice, generate)


def moe_infinity(folder: Path, context: int) -> Run:
    """Run MoE-Infinity with three quarters of the GPU's memory for experts."""
    engines: Any = import_module("moe_infinity")
    del context
    store = tempfile.mkdtemp()  # it writes its own copy of the experts, and reads it until the end
    model = engines.MoE(str(folder), {"offload_path": store, "device_memory_ratio": 0.75})

    def generate(prompts: Prompts, steps: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device="cuda")
        made = model.generate(
            ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0
        )
        return made[:, ids.shape[1] :].tolist()

    return partial(_twice, generate)


def _twice(
    generate: Callable[[Prompts, int], list[list[int]]], prompts: Prompts, steps: int
) -> Generation:
    """Tell prefill from decode where an engine says only how long both took."""
    start = time.perf_counter()
    generate(prompts, 1)
    first = time.perf_counter()
    tokens = generate(prompts, steps)
    prefill, whole = first - start, time.perf_counter() - first
    step = (whole - prefill) / (steps - 1)
    return Generation(prefill=prefill, step=step, tokens=tuple(map(tuple, tokens)))


def _tuples(ids: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(one) for one in row) for row in ids)


def _forms(ending: str, **how: str) -> dict[str, Callable[[Path, int], Run]]:
    return {
        f"transformers {name}{ending}": partial(transformers, name, **how)
        for name in IMPLEMENTATIONS
    }


MAKERS: Mapping[str, Callable[[Path, int], Run]] = {
    "moecc": partial(transformers, "eager", backend="moecc"),
    "moecc + eager": partial(transformers, "eager", backend="moecc", inner="eager"),
    **_forms(""),
    **_forms(" + inductor", backend="inductor"),
    "llama.cpp": llama,
    "vLLM": vllm,
    "MoE-Infinity": moe_infinity,
}
"""From a checkpoint's folder and the most tokens of a sequence."""


class Guest:
    """A contender in a fresh process, with as many threads as this one."""

    def __init__(self, name: str, folder: Path, context: int) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._connection, theirs = spawning.Pipe()
        arguments = (name, folder, context, torch.get_num_threads(), theirs)
        self._process = spawning.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def run(self, prompts: Prompts, steps: int) -> Generation:
        """Generate there; raises `Unable` with the reason that it gives, or that it died."""
        self._signal(signal.SIGCONT)
        try:
            self._connection.send((prompts, steps))
            answer: Generation | str = self._connection.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise Unable(f"its process ended with {self._process.exitcode}") from None
        self._signal(signal.SIGSTOP)
        if isinstance(answer, str):
            raise Unable(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGCONT)
        self._connection.close()
        self._process.join(5)
        self._process.kill()

    def _signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


def _serve(name: str, folder: Path, context: int, threads: int, connection: Connection) -> None:
    torch.set_num_threads(threads)
    inductor.compile_threads = 1  # a pool of processes would work beside those that are timed
    run = MAKERS[name](folder, context)
    while True:
        try:
            prompts, steps = connection.recv()
        except EOFError:  # the one who asks has gone
            return
        try:
            made = run(prompts, steps)
        except Unable as error:
            connection.send(str(error))
            continue
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        connection.send(replace(made, peak_memory=peak))

"""Examine one MoE family of transformers: what moecc raises, and whether it computes the same.

    python -m benchmarks.family qwen3_moe

Runs in its own process for each family (`benchmarks.coverage` starts them), and prints one line of
JSON last.
"""

import argparse
import inspect
import json
import resource
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch._dynamo import utils as dynamo

import moecc
from moecc.records import all_records
from moecc.runtime import ops
from moecc.tiny import tiny_model

PREFILLS = ((2, 16), (2, 23), (1, 9))
"""Sequences and tokens of each: the first two share all but their length."""
DECODE_STEPS = 3
TARGET_TOKENS = 6
"""Length of the decoder's prompt in encoder-decoder models."""
_OWNERS = ("DogeCDMoE", "JetMoeMoE")
"""Classes that own experts and do not say so in their names."""
_OTHERS = ("InklingSharedExperts", "JetMoeParallelExperts")
"""What every token goes through, and one product of an owner's experts."""
_UNFUSED = "torch: expert_linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """MoE layers that ran in one call of the model, and those of them that ran our kernels."""

    layers: int
    raised: int
    graphs: int
    """Compiled graphs that the call went through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What came of one family. Counts are those of the worst call."""

    family: str
    model: str
    inner: str
    dtype: str
    parameters: int
    prefill: Calls
    decode: Calls | None
    """None without a cache."""
    uncompiled: Calls
    """Prefill of the original module, as in `torch.compile(model).generate()`."""
    compiled: int
    """Graphs compiled for all calls together."""
    error: float
    """Relative to eager: the worst call's, or the median token's when router ties flip tokens."""
    misses: list[str]
    seconds: float


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Calls of a model beside the uncompiled one, which notes the layers that it runs."""

    plain: Callable[..., Any]
    layers: list[nn.Module]
    phases: dict[str, Calls] = field(default_factory=dict[str, Calls])
    """The worst call of each phase."""
    call_errors: list[float] = field(default_factory=list[float])
    token_errors: list[float] = field(default_factory=list[float])

    def __call__(
        self, phase: str, other: Callable[..., Any], inputs: dict[str, Any], ours: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Call both and return both outputs."""
        self.layers.clear()
        expected = self.plain(**inputs)
        graphs, kernels = _graph_calls(), _kernel_calls()
        got = other(**ours)
        calls = Calls(
            layers=len(self.layers),
            raised=_kernel_calls() - kernels,
            graphs=_graph_calls() - graphs,
        )
        worst = self.phases.setdefault(phase, calls)
        if calls.raised - calls.layers < worst.raised - worst.layers:
            self.phases[phase] = calls
        self._note_errors(_main(got), _main(expected))
        return expected, got

    def _note_errors(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        self.call_errors.append(relative_error(got, expected))
        tokens = zip(got.flatten(0, -2), expected.flatten(0, -2), strict=True)
        self.token_errors.extend(relative_error(*pair) for pair in tokens)

    def error(self, *, exact: bool) -> float:
        """Give the error of the worst call, or of the median token; NaN if there is one."""
        if exact:
            return float(torch.tensor(self.call_errors).max())
        return float(torch.tensor(self.token_errors).median())


def examine(family: str, inner: str = "eager", dtype: torch.dtype = torch.float32) -> Examined:
    """Run prefills and cached decode steps with and without moecc, and compare."""
    start = time.perf_counter()
    plain: Any = tiny_model(family, dtype)
    ours: Any = tiny_model(family, dtype)
    if plain._can_set_experts_implementation():
        plain.set_experts_implementation("eager")
    compiled = torch.compile(ours, backend="moecc", options={"inner": inner})
    with torch.no_grad(), counting_layers(plain) as layers:
        compare = Comparison(plain=plain, layers=layers)
        for shape in PREFILLS:
            inputs = _inputs(plain, *shape)
            outputs = compare("prefill", compiled, inputs, inputs)
            for step in range(DECODE_STEPS if _cache(outputs[0]) is not None else 0):
                common = _next_inputs(plain, inputs, _tokens(1000 + step, shape[0], 1))
                caches = ({"past_key_values": _cache(output)} for output in outputs)
                outputs = compare("decode", compiled, *(common | cache for cache in caches))
        inputs = _inputs(plain, *PREFILLS[0])
        compare("uncompiled", ours, inputs, inputs)
    return Examined(
        family=family,
        model=type(ours).__name__,
        inner=inner,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in ours.parameters()),
        prefill=compare.phases["prefill"],
        decode=compare.phases.get("decode"),
        uncompiled=compare.phases["uncompiled"],
        compiled=len(all_records()),
        error=compare.error(exact=dtype is torch.float32),
        misses=list(dict.fromkeys(_reasons(moecc.report(ours)))),
        seconds=time.perf_counter() - start,
    )


def owns_experts(module: nn.Module) -> bool:
    """Tell by its class whether a module is the experts of one MoE layer, apart from detection."""
    name = type(module).__name__
    return (name.endswith("Experts") and name not in _OTHERS) or name in _OWNERS


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    exact = expected.double()
    return float(torch.dist(got.double(), exact) / torch.dist(exact, torch.zeros_like(exact)))


@contextmanager
def counting_layers(model: nn.Module) -> Generator[list[nn.Module]]:
    """Collect every MoE layer that runs, by hooks on the modules that own the experts."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, _: object) -> None:
        ran.append(module)

    hooks = [
        module.register_forward_pre_hook(note) for module in model.modules() if owns_experts(module)
    ]
    yield ran
    for hook in hooks:
        hook.remove()


def _graph_calls() -> int:
    return sum(record.calls for record in all_records())


def _kernel_calls() -> int:
    return sum(count for kernel, count in ops.calls.items() if kernel != _UNFUSED)


def _main(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def _tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))


def _inputs(model: Any, sequences: int, length: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": _tokens(length, sequences, length)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(length + 1, sequences, TARGET_TOKENS)
    caches = "use_cache" in inspect.signature(model.forward).parameters
    return inputs | ({"use_cache": True} if caches else {})


def _next_inputs(model: Any, before: dict[str, Any], token: torch.Tensor) -> dict[str, Any]:
    """Give the inputs of a decode step, but for the cache."""
    if "decoder_input_ids" not in before:
        return {"input_ids": token, "use_cache": True}
    encoded = model.get_encoder()(input_ids=before["input_ids"])
    return {"encoder_outputs": encoded, "decoder_input_ids": token, "use_cache": True}


def _cache(output: Any) -> Any:
    return getattr(output, "past_key_values", None)


def _reasons(report: moecc.Report) -> Iterator[str]:
    for broken in cast(list[Any], dynamo.graph_break_reasons):
        lines = [line.strip().removeprefix("Explanation: ") for line in broken.reason.splitlines()]
        stack = broken.user_stack
        where = f" at {Path(stack[-1].filename).name}:{stack[-1].lineno}" if stack else ""
        yield f"Dynamo breaks the graph{where}: {' – '.join(lines[:2])}"
    yield from report.notes
    for graph in report.graphs:
        for miss in graph.misses:
            yield f"{miss['where']}: {miss['why']}"
    if report.eager is not None:
        yield from report.eager.reasons


def main() -> None:
    """Examine the family named on the command line."""
    parser = argparse.ArgumentParser(description=examine.__doc__)
    parser.add_argument("family")
    parser.add_argument("--inner", default="eager")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that the process may take")
    arguments = parser.parse_args()
    limit = int(arguments.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    warnings.filterwarnings("ignore")
    found = examine(arguments.family, arguments.inner, getattr(torch, arguments.dtype))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()

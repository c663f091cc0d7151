from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend

import moecc
from moecc.passes.ir import Program
from moecc.passes.lower_attention import lower_attention
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, run
from moecc.passes.text import graph_diff
from moecc.runtime import ops
from tests.models import Captured, capture, relative_error

HEADS, SHARED, DEPTH = 8, 2, 16
KERNEL = "native: attention float32 cpu"
Tensors = tuple[torch.Tensor, ...]


def repeated(x: torch.Tensor) -> torch.Tensor:
    """Repeat heads as transformers does."""
    batch, shared, keys, depth = x.shape
    spread = x[:, :, None, :, :].expand(batch, shared, HEADS // shared, keys, depth)
    return spread.reshape(batch, HEADS, keys, depth)


class Calls(nn.Module):
    """Attention over a cache, written in some way."""

    def __init__(self, write: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.write = write

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.write(*tensors).transpose(1, 2).flatten(2)


def as_static(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return attend(q, repeated(k), repeated(v), attn_mask=m, scale=0.3)


def as_unsqueezed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    k, v = (x.unsqueeze(2).expand(-1, -1, 4, -1, -1).flatten(1, 2) for x in (k, v))
    return attend(q, k, v)


def as_interleaved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return attend(q, k.repeat_interleave(4, dim=1), v.repeat_interleave(4, 1), is_causal=True)


def as_grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return attend(q, k, v, enable_gqa=True)


def as_tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    """Heads one after another, over and over: each query head has its own."""
    return attend(q, k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1))


def as_written_between(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    keys, values = repeated(k), repeated(v)
    k.neg_()
    return attend(q, keys, values)


WAYS = {  # heads of the keys that the kernel reads
    as_static: SHARED, as_unsqueezed: SHARED, as_interleaved: SHARED, as_grouped: SHARED,
    as_tiled: HEADS, as_written_between: HEADS,
}  # fmt: skip


def tensors(tokens: int = 1, keys: int = 24, dtype: torch.dtype = torch.float32) -> Tensors:
    query = torch.randn(1, tokens, HEADS, DEPTH, dtype=dtype).transpose(1, 2)
    key, value = torch.randn(2, 1, SHARED, keys, DEPTH, dtype=dtype)
    return query, key, value, (torch.arange(keys) < 20).expand(1, 1, tokens, keys)


def lowered(captured: Captured, options: Options = Options(), **program: Any) -> Result:  # noqa: B008
    return run(Program(gm=captured.gm, **program), options, (lower_attention,), keep_text=True)


def test_reads_the_cache_itself(golden: Callable[[str], None]) -> None:
    step = lowered(capture(Calls(as_static), *tensors())).steps[0]
    golden(graph_diff(step.before, step.after, "lower_attention") + "\n")


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_keeps_the_numbers(way: Callable[..., torch.Tensor], tokens: int) -> None:
    captured = capture(Calls(way), *tensors(tokens))
    wanted, got = (Captured(captured.gm, list(map(torch.clone, captured.inputs))) for _ in range(2))
    expected = wanted.run()
    (found,) = lowered(captured).program.attentions
    assert (found.heads, found.shared, found.kernel) == (HEADS, WAYS[way], KERNEL)
    assert relative_error(got.run(), expected) < 1e-6


def test_running_twice_is_running_once() -> None:
    captured = capture(Calls(as_static), *tensors())
    once = lowered(captured)
    twice = run(once.program, Options(), (lower_attention,), keep_text=True)
    assert twice.steps[0].after == once.steps[0].after
    assert twice.program == once.program


def test_a_result_that_was_contiguous_stays_so() -> None:
    class Viewed(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(q, k, v, enable_gqa=True).view(HEADS * 3, DEPTH)

    query, key, value, _ = tensors(3)
    given = query.contiguous(), key, value
    captured = capture(Viewed(), *given)
    assert lowered(captured).steps[0].rewrites == 1
    assert relative_error(captured.run(), Viewed()(*given)) < 1e-6


def test_prompts_stay_torchs() -> None:
    step = lowered(capture(Calls(as_static), *tensors(9))).steps[0]
    assert step.rewrites == 0
    assert step.note == "1 not of 1 to 8 query tokens on a CPU: torch computes them"


def dropping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return attend(q, k, v, dropout_p=0.5, enable_gqa=True)


def spread(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return attend(q, k[:, :1], v[:, :1])


def spread_batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return attend(q.expand(3, -1, -1, -1), k, v, enable_gqa=True)


def autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return attend(q, k, v, enable_gqa=True)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (dropping, "it drops values"),
        (spread, "broadcast"),
        (spread_batch, "broadcast"),
        (autocast, "in one dtype"),
    ],
)
def test_says_what_it_does_not_read(way: Callable[..., torch.Tensor], why: str) -> None:
    result = lowered(capture(Calls(way), *tensors()))
    (miss,) = result.misses
    assert why in miss.why
    assert not miss.fallback
    assert result.steps[0].rewrites == 0


@pytest.mark.parametrize(
    ("options", "trains"),
    [(Options(attention=False), False), (Options(kernels="torch"), False), (Options(), True)],
)
def test_says_why_it_is_off(options: Options, trains: bool) -> None:
    step = lowered(capture(Calls(as_static), *tensors()), options, trains=trains).steps[0]
    assert step.rewrites == 0
    assert step.note.startswith("off: ")


def test_one_graph_serves_caches_of_all_lengths() -> None:
    class Projected(Calls):
        """Has a parameter, by which a report finds its graphs."""

        def __init__(self) -> None:
            super().__init__(as_grouped)
            self.proj = nn.Linear(HEADS * DEPTH, 8).requires_grad_(False)

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return self.proj(super().forward(*given))

    model = Projected()
    compiled = torch.compile(model, backend="moecc", options={"strict": True})
    before = ops.calls[KERNEL]
    for keys in (5, 9, 64, 130):
        given = tensors(1, keys)[:3]
        for one in given[1:]:
            torch._dynamo.mark_dynamic(one, 2)
        assert relative_error(compiled(*given), model(*given)) < 1e-6
    assert ops.calls[KERNEL] == before + 4
    (graph,) = moecc.report(model).graphs
    assert graph.calls == 4

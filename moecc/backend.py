"""Compile a Dynamo graph: the function behind `torch.compile(model, backend="moecc")`.

torch loads this module when it looks the backend up, before anything is traced; that is when
capture is installed (`moecc.capture`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from moecc import capture, dump
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import run
from moecc.records import Record


def moecc(
    gm: GraphModule,
    example_inputs: Sequence[torch.Tensor],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Rewrite the MoE blocks of a graph and hand the rest to the inner backend.

    `options` are those of `moecc.Options`; `mode` is torch.compile's and goes to inductor.
    Raises `OptionError` for bad options, `StrictError` when `strict` forbids a fallback.
    """
    chosen = Options.parse(options)
    wants_grad = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )
    program = Program(gm=gm, trains=wants_grad)
    result = run(program, chosen, keep_text=dump.wanted())
    dump.write(result)
    record = Record.of(result, chosen, example_inputs, capture.take_notes())
    return record.count(_inner(chosen.inner, mode)(gm, example_inputs))


def _inner(name: str, mode: str | None) -> Callable[..., Callable[..., Any]]:
    """Look the inner backend up, with torch.compile's mode turned into inductor's options."""
    compiler: Callable[..., Callable[..., Any]] = lookup_backend(name)
    if name != "inductor" or mode is None:
        return compiler
    patches: dict[str, Any] = torch._inductor.list_mode_options(mode)  # pyright: ignore[reportPrivateUsage]
    return lambda gm, inputs: compiler(gm, inputs, config_patches=patches)


capture.install(moecc)

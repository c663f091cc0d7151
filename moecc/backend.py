"""Compile a Dynamo graph: the function behind `torch.compile(model, backend="moecc")`.

torch loads this module when it looks the backend up, before anything is traced; that is when
capture is installed (`moecc.capture`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from moecc import capture, dump, log
from moecc.inner import inner_compiler, why_whole
from moecc.lenders import check_schemes
from moecc.parallel import agree
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, run
from moecc.passes.repeats.extract import readers
from moecc.pieces import compile_pieces
from moecc.records import Record
from moecc.runtime.errors import InputError, StrictError
from moecc.runtime.offload.bank import is_lent
from moecc.runtime.offload.stand_in import is_stand_in, lender_of
from moecc.watching import Watch

_passes = logging.getLogger("moecc.passes")
_kernels = logging.getLogger("moecc.kernels")


def moecc(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Rewrite the MoE blocks of a graph and hand the rest to the inner backend.

    `options` are those of `moecc.Options`; `mode` is torch.compile's and goes to inductor.
    Raises `OptionError` for bad options, `StrictError` when `strict` forbids a fallback.
    """
    chosen = Options.parse(options)
    agree(chosen)
    tensors: list[torch.Tensor] = [
        value for value in example_inputs if isinstance(value, torch.Tensor)
    ]
    wants_grad = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    trains = wants_grad or _switches_gradients_on(gm)
    on_gpu = any(value.is_cuda for value in tensors)
    auto = chosen.inner == "auto"
    inner = "inductor" if auto else chosen.inner
    watch = Watch(inner=inner, compiler=inner_compiler(inner, mode, on_gpu), auto=auto)
    whole = why_whole(inner, mode, on_gpu)
    program = Program(gm=gm, trains=trains, lent=_lent(gm, example_inputs), whole=whole)
    result = run(program, chosen, keep_text=dump.wants_text())
    _refuse_other_schemes(result.program, example_inputs, chosen)
    dump.write(result.steps, result.program.lowerings)
    _log(result)
    notes = capture.take_notes()
    _refuse_readers_of_stand_ins(gm, example_inputs, [one.why for one in (*notes, *result.misses)])
    if chosen.strict and (refused := [note for note in notes if note.fallback]):
        listed = "; ".join(f"{note.where}: {note.why}" for note in refused)
        raise StrictError(f"strict=True and capture had to leave things alone: {listed}")
    record = Record.of(result, chosen, tensors, notes, watch)
    with watch.telling(chosen.progress):
        if result.program.callees:
            return record.count(compile_pieces(gm, watch))
        return record.count(watch.compile(gm, example_inputs))


def _lent(gm: GraphModule, example_inputs: Sequence[Any]) -> frozenset[str]:
    """Name the inputs that stand in for experts on disk."""
    inputs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)
    return frozenset(node.name for node, value in inputs if is_lent(value))


def _refuse_other_schemes(
    program: Program, example_inputs: Sequence[Any], options: Options
) -> None:
    """Raise `OptionError` where a graph, perhaps of a function, asks lent experts for schemes."""
    names = [node.name for node in program.gm.graph.find_nodes(op="placeholder")]
    values = dict(zip(names, example_inputs, strict=False))
    for block in program.blocks:
        lender = lender_of(values[block.gate_up]) if block.gate_up in values else None
        if lender is not None:
            check_schemes(block.path, block.schemes, lender, options)


_READERS = (
    torch.ops.moecc.experts.default,
    torch.ops.moecc.experts.apart,
    torch.ops.moecc.prefetch.default,
    torch.ops.moecc.recall.default,
)


def _refuse_readers_of_stand_ins(
    gm: GraphModule, example_inputs: Sequence[Any], reasons: Sequence[str]
) -> None:
    """Raise `InputError` where a graph would compute with the NaN that stands for experts."""
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        other = [user for user in readers(node) if user.target not in _READERS]
        if is_stand_in(value) and other:
            why = "; ".join(reasons) or "it is part of no block"
            raise InputError(
                f"the experts in {node.name!r} are not in memory, where only moecc's kernels read "
                f"them, and node {other[0].name!r} does: {why}"
            )


def _switches_gradients_on(gm: GraphModule) -> bool:
    """Tell whether the model itself asks for gradients in the middle of its forward."""
    switches = gm.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)  # pyright: ignore
    return not torch.is_grad_enabled() and any(node.args[0] is True for node in switches)


def _log(result: Result) -> None:
    for step in result.steps:
        _passes.info(
            "%s: %d rewrites, %d → %d nodes, %.1f ms %s",
            step.name, step.rewrites, step.nodes_before, step.nodes_after, step.milliseconds,
            step.note,
        )  # fmt: skip
        for miss in step.misses:
            _passes.info("%s left alone: %s", miss.where, miss.why)
    for lowering in result.program.lowerings:
        _kernels.info("%s: %s", lowering.block, lowering.kernel)


log.install()
capture.install(moecc)

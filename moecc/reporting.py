"""Tell what moecc did to a model: blocks, passes, kernels, roads taken, what it left alone."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from moecc import __version__, transformers_experts
from moecc.lenders import ExpertsReport, report_experts
from moecc.parallel import ShareReport, report_shares
from moecc.passes.pipeline import Step
from moecc.plain import plain
from moecc.records import Record, all_records, notes_about
from moecc.runtime.errors import InputError
from moecc.speculation.known import speculations
from moecc.watching import Watch

_NO_BLOCK = "no MoE block found"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphReport:
    """One compiled graph of the model."""

    calls: int
    passes: tuple[dict[str, Any], ...]
    """name, rewrites, nodes_before, nodes_after, milliseconds, note"""
    blocks: tuple[dict[str, Any], ...]
    """path, style, source, experts, active, hidden_size, intermediate, dtype, activation, kernel,
    router_kernel; router: text, steps, unknown, matrix, matrix_bias, dtype, reads; shared: text,
    intermediate, gated, activation, gate, then, unknown, or None"""
    attentions: tuple[dict[str, Any], ...]
    """path, heads, shared, kernel: attention of a few query tokens that moecc's kernels compute"""
    linears: tuple[dict[str, Any], ...]
    """path, inputs, outputs, dtype, kernel: linear layers that moecc's kernels compute"""
    callees: tuple[dict[str, Any], ...]
    """name, paths, nodes, severed: layers that are alike, compiled once for all their paths"""
    misses: tuple[dict[str, Any], ...]
    """where, why, fallback, node, source"""
    compilation: dict[str, Any]
    """tracing: seconds that Dynamo took to the graph, or None; inner, pieces (name, nodes, seconds,
    eager: its share of a call if it is left as it is, or None), resident, peak: GB of the process
    before, and the most until then"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerReport:
    """The model's experts outside Dynamo: `generate` on the original module, uncompiled prefill."""

    modules: int
    calls: int
    """By our kernels."""
    own_calls: int
    """By the model's own code."""
    kernels: tuple[str, ...]
    reasons: tuple[str, ...]
    """Why the model's own code, or a slower kernel, ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What moecc did to a model. `str()` is for people, `to_dict()` is JSON."""

    version: str
    torch: str
    graphs: tuple[GraphReport, ...]
    eager: EagerReport | None
    experts: ExpertsReport | None
    """Where experts live that are not in the model's own tensors (`moecc.load`)."""
    speculation: tuple[dict[str, Any], ...]
    """Of each source of drafts: source, copied_bytes, copies (held, made: times, price: seconds,
    plain: seconds of a token without; None where no cache gives slots), calls_without_copy (calls
    that drafted with a block's own weights), cycles, drafted, accepted, tokens, draft_seconds,
    verify_seconds, chances (of the i-th drafted token where those before it stayed), k, depths (k,
    tokens, draft, verify, seconds, rate: what each would give)"""
    parallel: tuple[ShareReport, ...]
    """Blocks whose experts are shared among ranks, as this one sees them."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain lists, dictionaries, numbers and strings."""
        return plain(self)

    def __str__(self) -> str:
        """Write the report as text."""
        from moecc.render import report_text

        return report_text(self)


def report(model: nn.Module) -> Report:
    """Report on every graph that was compiled with the model's parameters.

    `model` is the model itself or what `torch.compile` returned. Graphs count their calls; eager
    calls are counted for each adopted experts module. Raises `InputError` for anything else.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"report() takes a torch.nn.Module, not {type(model).__name__}")
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    own = tuple(record for record in all_records() if record.reads(tensors))
    eager, lent = _eager(model), report_experts(model)
    return Report(
        version=__version__,
        torch=torch.__version__,
        graphs=tuple(map(graph_report, own)),
        eager=eager,
        experts=lent,
        speculation=tuple(one.to_dict() for one in speculations(model)),
        parallel=report_shares(model),
        notes=(*notes_about(model), *_kept_precise(model, own, lent), *_notes(own, eager)),
    )


def graph_report(record: Record) -> GraphReport:
    """Turn one record into plain values."""
    kernels = {lowering.block: lowering.kernel for lowering in record.lowerings}
    return GraphReport(
        calls=record.calls,
        passes=tuple(map(_pass, record.steps)),
        blocks=tuple(_block(block, kernels.get(block.path, "")) for block in record.blocks),
        attentions=tuple(map(asdict, record.attentions)),
        linears=tuple(asdict(one) | {"dtype": _name(one.dtype)} for one in record.linears),
        callees=tuple(map(_callee, record.callees)),
        misses=tuple(asdict(miss) for miss in record.misses),
        compilation=_compilation(record.watch),
    )


def _pass(step: Step) -> dict[str, Any]:
    names = ("name", "rewrites", "nodes_before", "nodes_after", "milliseconds", "note")
    return {name: getattr(step, name) for name in names}


def _block(block: Any, kernel: str) -> dict[str, Any]:
    sizes = ("experts", "active", "hidden_size", "intermediate")
    names = ("path", "style", "source", *sizes, "router_kernel")
    plain = {name: getattr(block, name) for name in names}
    described = {
        name: None if (found := getattr(block, name)) is None else found.to_dict()
        for name in ("router", "shared")
    }
    text = {"dtype": _name(block.dtype), "activation": str(block.activation), "kernel": kernel}
    return plain | text | described


def _callee(callee: Any) -> dict[str, Any]:
    return {name: getattr(callee, name) for name in ("name", "paths", "nodes", "severed")}


def _compilation(watch: Watch) -> dict[str, Any]:
    names = ("tracing", "inner", "resident", "peak")
    figures = {name: getattr(watch, name) for name in names}
    return figures | {"pieces": tuple(map(asdict, watch.pieces))}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _eager(model: nn.Module) -> EagerReport | None:
    adopted = transformers_experts.adopted
    roads = [adopted[module] for module in model.modules() if module in adopted]
    if not roads:
        return None
    return EagerReport(
        modules=len(roads),
        calls=sum(road.calls for road in roads),
        own_calls=sum(road.own_calls for road in roads),
        kernels=tuple(dict.fromkeys(road.kernel.key for road in roads if road.kernel)),
        reasons=tuple(dict.fromkeys(road.why for road in roads if road.why)),
    )


def _kept_precise(
    model: nn.Module, records: tuple[Record, ...], lent: ExpertsReport | None
) -> list[str]:
    """Say what is not low-bit where experts are."""
    adopted = transformers_experts.adopted
    rounded = any(block.schemes for record in records for block in record.blocks)
    rounded |= any(adopted[one].schemes for one in model.modules() if one in adopted)
    rounded |= lent is not None and any(block["schemes"] for block in lent.blocks)
    kept = "low-bit are routed experts alone: routers, norms, attention and shared experts are not"
    return [kept] if rounded else []


def _notes(records: tuple[Record, ...], eager: EagerReport | None) -> list[str]:
    """Say the things that a user would otherwise have to find out."""
    notes: list[str] = []
    if not records and eager is None:
        notes.append(
            "no graph was compiled with this model's weights, and none of its modules was adopted: "
            "it was not compiled with moecc, was not called yet, or shares another model's graph"
        )
    elif not records and eager is not None and eager.calls:
        notes.append("no graph compiled: all calls so far bypassed torch.compile")
    elif not records:
        notes.append(
            "no graph was compiled with this model's own weights: it was not called yet, or a "
            "graph compiled for another model of its class serves it too"
        )
    elif not any(record.blocks for record in records):
        notes.append(_NO_BLOCK)
    if _hit_recompile_limit():
        notes.append("Dynamo hit its recompile limit somewhere: those frames now run uncompiled")
    return notes


def _hit_recompile_limit() -> bool:
    from torch._dynamo.utils import counters

    return any("recompile_limit" in reason for reason in counters["unimplemented"])

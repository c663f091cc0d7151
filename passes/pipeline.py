"""Run the passes, in order, and check the graph after each one."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from torch.fx import Graph, Node

from moecc.passes.dense_linears import dense_linears
from moecc.passes.detect_moe import detect_moe
from moecc.passes.fuse_experts import fuse_experts
from moecc.passes.fuse_linears import fuse_linears
from moecc.passes.fuse_routers import fuse_routers
from moecc.passes.fuse_shared import fuse_shared
from moecc.passes.insert_prefetch import insert_prefetch
from moecc.passes.ir import Miss, Outcome, Program
from moecc.passes.lower import lower
from moecc.passes.lower_attention import lower_attention
from moecc.passes.options import Options
from moecc.passes.outline_layers import outline_layers
from moecc.passes.pattern import mutates
from moecc.passes.quantize_experts import quantize_experts
from moecc.passes.schedule_offload import schedule_offload
from moecc.passes.shard_experts import shard_experts
from moecc.passes.text import graph_text
from moecc.runtime.errors import MoeccError, PassError, StrictError

Pass = Callable[[Program, Options], Outcome]

PIPELINE: tuple[Pass, ...] = (
    detect_moe,
    fuse_experts,
    shard_experts,  # before what depends on where experts are
    quantize_experts,  # after fuse: a scheme is chosen for a block's whole weights
    schedule_offload,  # after quantize: the budget counts real bytes
    insert_prefetch,  # after schedule: which experts live elsewhere is known
    lower,  # after these: the kernel depends on scheme and placement
    lower_attention,
    fuse_shared,  # after lower: kernels for GPUs add shared experts
    fuse_routers,  # after insert_prefetch: predictions copy the model's own router
    dense_linears,  # after these: they read routers and shared experts as linear layers
    fuse_linears,
    outline_layers,  # last: what a layer is made of is in its callee then
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one pass did, for the table of passes."""

    name: str
    rewrites: int
    nodes_before: int
    nodes_after: int
    milliseconds: float
    misses: tuple[Miss, ...]
    note: str
    before: str
    """The graph as text; empty unless `keep_text` was asked for."""
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The rewritten program and how it came about."""

    program: Program
    steps: tuple[Step, ...]

    @property
    def misses(self) -> tuple[Miss, ...]:
        """Everything that was left alone, in pipeline order."""
        return tuple(miss for step in self.steps for miss in step.misses)


def run(
    program: Program,
    options: Options,
    pipeline: tuple[Pass, ...] = PIPELINE,
    keep_text: bool = False,
) -> Result:
    """Run every pass.

    Raises `PassError` naming the pass that failed, and `StrictError` if `options.strict` and a
    pass had to fall back.
    """
    steps: list[Step] = []
    for one in pipeline:
        step, program = _run_pass(one, program, options, keep_text)
        steps.append(step)
        fallbacks = [miss for miss in step.misses if miss.fallback]
        if options.strict and fallbacks:
            listed = "; ".join(f"{miss.where}: {miss.why}" for miss in fallbacks)
            raise StrictError(f"strict=True and {step.name} had to leave things alone: {listed}")
    if any(step.rewrites for step in steps):
        program.gm.recompile()  # once: no pass runs the graph
    return Result(program=program, steps=tuple(steps))


def _run_pass(
    one: Pass, program: Program, options: Options, keep_text: bool
) -> tuple[Step, Program]:
    name, graph = one.__name__, program.gm.graph
    count, before = len(graph.nodes), graph_text(graph) if keep_text else ""
    used = {node for node in graph.nodes if node.users}
    start = perf_counter()
    with _naming(name):
        outcome = one(program, options)
        if outcome.rewrites:
            _drop_orphans(graph, used)
            graph.lint()
        _check(outcome.program, name)
    step = Step(
        name=name,
        rewrites=outcome.rewrites,
        nodes_before=count,
        nodes_after=len(graph.nodes),
        milliseconds=(perf_counter() - start) * 1e3,
        misses=outcome.misses,
        note=outcome.note,
        before=before,
        after=graph_text(graph) if keep_text else "",
    )
    return step, outcome.program


@contextmanager
def _naming(name: str) -> Generator[None]:
    try:
        yield
    except MoeccError:
        raise
    except Exception as error:
        raise PassError(
            f"pass {name!r} failed with {type(error).__name__}: {error}; this is a defect of "
            "moecc, and torch.compile(model) without it still works"
        ) from error


def _drop_orphans(graph: Graph, used: set[Node]) -> None:
    """Erase what lost its last user in this pass.

    fx's own dead-code removal is for functional graphs. In Dynamo's, a node without users may
    write in place or open a scope (vmap, autocast), so what nobody used before stays.
    """
    for node in reversed(graph.nodes):
        if node in used and not node.users and not mutates(node) and node.op != "placeholder":
            graph.erase_node(node)


def _check(program: Program, name: str) -> None:
    """Hold every decision against the graph: the nodes it names exist."""
    names = {node.name for node in program.gm.graph.nodes}
    names = names.union(*(callee.held for callee in program.callees))
    for block in program.blocks:
        inputs = (block.hidden, block.ids, block.weights, block.gate_up, block.down, block.output)
        lost = [each for each in inputs if each not in names]
        if lost:
            raise PassError(f"pass {name!r} lost nodes {lost} of block {block.path!r}")

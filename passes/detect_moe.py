"""Find the experts of every MoE layer in the graph.

Needs: nothing.  Adds: blocks.  Graph: unchanged, but for what `passes/capacity/apart` writes.

A block is matched by structure (`passes/styles`): an index tensor that selects among E weight sets,
two products with an activation between them, and a weighted sum back to the tokens. Names of
modules label a report and never decide. What looked like a block and was not is a miss that says
how far the matcher came, where it stopped and why.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Graph, Node

from moecc.passes.axes import shape_of
from moecc.passes.capacity.find import find_dispatched
from moecc.passes.describe_blocks import describe_blocks
from moecc.passes.fit import Memory, interior, misfit
from moecc.passes.found import Found, NearMiss
from moecc.passes.ir import Miss, MoeBlock, Outcome, Program
from moecc.passes.match_pattern import match_pattern
from moecc.passes.options import Options
from moecc.passes.pattern import op_name
from moecc.passes.products.assemble import assemble
from moecc.passes.products.candidates import candidates
from moecc.passes.products.match import read_experts
from moecc.passes.router.values import Unreadable, Values
from moecc.passes.source import module_path, source_line
from moecc.passes.styles import DISPATCH_STYLES, PRODUCT_STYLES, STYLES

_SURPRISES = (AttributeError, IndexError, KeyError, TypeError, Unreadable, ValueError)
"""What reading arguments raises that are not of the kind that a model usually gives."""


def detect_moe(program: Program, options: Options) -> Outcome:
    """Match every style at every node that could end a block."""
    if program.blocks:
        return Outcome(program=program, note="blocks are known already")
    graph = program.gm.graph
    given = list(graph.nodes)
    search = _Search(graph)
    for node in given:
        search.look_at(node)
    blocks, misses = tuple(search.blocks), search.told_misses()
    if program.trains and blocks:
        why = "gradients are wanted, and fused experts have none; run under torch.no_grad()"
        misses += tuple(Miss(where=block.path, why=why, fallback=True) for block in blocks)
        blocks = ()
    _erase_readings(graph, {*given}, blocks)
    described = describe_blocks(graph, blocks)
    return Outcome(program=replace(program, blocks=described), misses=misses)


def _erase_readings(graph: Graph, given: set[Node], blocks: Sequence[MoeBlock]) -> None:
    """Erase what was written to read experts that are called one by one, and is in no block."""
    parts = {name for block in blocks for name in block.interior}
    for node in reversed(graph.nodes):
        if node not in given and node.name not in parts:
            graph.erase_node(node)


class _Search:
    """What was found in one graph so far."""

    def __init__(self, graph: Graph) -> None:
        self.blocks: list[MoeBlock] = []
        self._graph = graph
        self._candidates = candidates(graph)
        self._values: Values | None = None
        self._memory: Memory | None = None
        self._taken: set[Node] = set()
        self._misses: dict[Node, tuple[Node, Miss]] = {}

    def look_at(self, node: Node) -> None:
        """Note the block that ends at a node, or what keeps it from being one."""
        miss: NearMiss | None = None
        key = node
        for look in (self._patterns, self._products, self._dispatched):
            try:
                found = look(node)
            except NearMiss as stop:
                miss, key = miss or stop, stop.key or key
                continue
            except _SURPRISES as error:
                why = f"the matcher cannot read it: {type(error).__name__}: {error}"
                miss = miss or NearMiss(node, why)
                continue
            if found is not None:
                self._take(*found)
                return
        if miss is not None:
            told = Miss(
                where=_path(node),
                why=miss.why,
                fallback=miss.fallback,
                node=miss.node.name,
                source=source_line(miss.node),
            )
            self._misses[key] = (node, told)

    def told_misses(self) -> tuple[Miss, ...]:
        """Give one miss for each thing that is no part of a block."""
        return tuple(
            miss
            for key, (node, miss) in self._misses.items()
            if self._taken.isdisjoint((key, node))
        )

    def _patterns(self, node: Node) -> tuple[str, Found] | None:
        styles = [style for style in STYLES if style.anchor == op_name(node)]
        for style in styles:
            if (found := match_pattern(style, node)) is not None:
                self._check(found)
                return style.name, found
        return None

    def _products(self, node: Node) -> tuple[str, Found] | None:
        styles = [style for style in PRODUCT_STYLES if op_name(node) in style.anchors]
        experts = read_experts(node) if styles and node in self._candidates else None
        if experts is None:
            return None
        weighs = "input" if experts.second.weights is None else "output"
        names = [
            one.name for one in styles if one.chooses == experts.chooses and weighs in one.weighs
        ]
        if not names:
            return None
        self._values = self._values or Values(self._graph)
        found = assemble(self._values, experts, node)
        self._check(found, key=found.down)
        return names[0], found

    def _dispatched(self, node: Node) -> tuple[str, Found] | None:
        for style in DISPATCH_STYLES:
            if op_name(node) in style.anchors and (found := find_dispatched(node)) is not None:
                self._check(found, key=found.down)
                return style.name, found
        return None

    def _check(self, found: Found, key: Node | None = None) -> None:
        self._memory = self._memory or Memory(self._graph)
        if why := misfit(found) or self._memory.write(found):
            raise NearMiss(found.output, why, key)

    def _take(self, style: str, found: Found) -> None:
        parts = {*found.work, found.output}
        if self._taken.isdisjoint(parts):
            self._taken |= {*parts, found.down}
            self.blocks.append(_block(style, found))


def _path(node: Node) -> str:
    return module_path(node) or node.name


def _block(style: str, found: Found) -> MoeBlock:
    experts, *sides = map(int, shape_of(found.down))
    outer, inner = sides[::-1] if found.down_transposed else sides
    matrices = found.down.meta["example_value"]

    def name(node: Node | None) -> str | None:
        return node.name if node is not None else None

    return MoeBlock(
        path=_path(found.output),
        style=style,
        source=source_line(found.output),
        hidden=found.hidden.name,
        ids=found.ids.name,
        weights=found.weights.name,
        dense_gates=found.dense_gates,
        weighs=found.weighs,
        wraps=found.wraps,
        routes=found.routes,
        onto=name(found.onto),
        gate_up=found.gate_up.name,
        up=name(found.up),
        down=found.down.name,
        gate_up_bias=name(found.gate_up_bias),
        up_bias=name(found.up_bias),
        down_bias=name(found.down_bias),
        learned=name(found.learned),
        output=found.output.name,
        interior=tuple(sorted(part.name for part in interior(found))),
        hidden_size=outer,
        intermediate=inner,
        experts=experts,
        active=found.active,
        dtype=matrices.dtype,
        device=matrices.device.type,
        activation=found.activation,
        gated=found.gated,
        interleaved=found.interleaved,
        transposed=found.transposed,
        down_transposed=found.down_transposed,
    )

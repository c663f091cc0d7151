"""Cut layers that repeat into callees, which the inner backend compiles once each.

Needs: nothing.  Adds: callees.  Graph: each such layer is a call of its callee.

    %norm = ..(%x0, @layers.0.norm) ... %x1 = add(%x0, %experts)
    %norm_1 = ..(%x1, @layers.1.norm) ... %x2 = add(%x1, %experts_1)
→
    %layer = layer(%x0, @layers.0.norm, ...)      %x1 = getitem(%layer, 0)
    %layer_1 = layer(%x1, @layers.1.norm, ...)    %x2 = getitem(%layer_1, 0)

Layers are found by structure (`passes/repeats`): the same operators on the same shapes, wired
alike; weights, handles, tables and masks are inputs. A cut is what a graph break is, so writes in
place and views mean what they did. What is fused across it no longer is, and is named. Where layers
are few, or the graph has to stay whole, nothing is cut (`docs/decisions/0027`).
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch.fx import Node

from moecc.passes.ir import Callee, Outcome, Program
from moecc.passes.options import Options
from moecc.passes.pattern import op_name
from moecc.passes.repeats.borders import borders, computed
from moecc.passes.repeats.extract import extract, replace_by_call
from moecc.passes.repeats.layers import join
from moecc.passes.repeats.windows import Facts, Window, value_of, window
from moecc.passes.source import module_path

_PIECE = 40
"""Nodes that take as long to compile as it takes to begin with one more graph."""
_WORTH = 3
"""Auto cuts where it saves at least one part in so many of the whole graph's compilation."""


def outline_layers(program: Program, options: Options) -> Outcome:
    """Replace layers that repeat by calls of one callee for each kind."""
    if why := _why_whole(program, options):
        return Outcome(program=program, note=f"off: {why}")
    graph = program.gm.graph
    nodes, facts = computed(graph), Facts.read(graph)
    least = _PIECE if options.outline == "auto" else 1
    cuts = [(windows, _repeated(windows, least)) for windows in _cuts(nodes, facts)]
    asked = options.outline is True
    found, kinds = min(cuts, key=lambda cut: (asked and not cut[1], _compiled(*cut)))
    before, after = len(nodes), _compiled(found, kinds)
    if not kinds or (options.outline == "auto" and before - after < before / _WORTH):
        return Outcome(program=program, note=f"too few layers repeat in {before} nodes")
    if any(rest.entangled for rest in _left(found, kinds, facts)):
        note = "off: what is left writes to memory that it shares with layers"
        return Outcome(program=program, note=note)
    names = {key: f"layer{number}" for number, key in enumerate(kinds)}
    callees = tuple(_callee(names[key], same) for key, same in kinds.items())
    for key, same in kinds.items():
        program.gm.add_submodule(names[key], extract(same[0]))
    for layer in reversed(found):  # a call takes what the layers before it have not replaced yet
        if layer.key in names:
            replace_by_call(layer, partial(graph.call_module, names[layer.key]))
    calls = sum(len(one.paths) for one in callees)
    note = f"{calls} calls of {len(callees)}; compiles {after} of {before} nodes' worth"
    return Outcome(program=replace(program, callees=callees), rewrites=calls, note=note)


def _why_whole(program: Program, options: Options) -> str:
    if options.outline is False:
        return "the graph is compiled whole"
    if program.trains:
        return "gradients are wanted"
    if program.callees:
        return "layers are callees already"
    graph = program.gm.graph
    if any(isinstance(value_of(node), torch.SymFloat) for node in graph.nodes):
        return "a number that it reads may change from call to call"
    constants = map(value_of, graph.find_nodes(op="get_attr"))
    plain = all(isinstance(one, torch.Tensor) for one in constants)
    if not plain or graph.find_nodes(op="call_module"):
        return "the graph calls modules of its own"
    return program.whole if options.outline == "auto" else ""


def _cuts(nodes: Sequence[Node], facts: Facts) -> Iterator[list[Window]]:
    """Cut a graph into windows, those that repeat being whole layers, in several ways."""
    for at in borders(nodes):
        ends = zip([0, *at], [*at, len(nodes)], strict=True)
        windows = [window(nodes[start:end], facts) for start, end in ends]
        yield join(windows, lambda more: window(more, facts))


def _repeated(windows: Sequence[Window], least: int) -> dict[Hashable, list[Window]]:
    """Give those that are alike, where it saves compiling at least so many nodes."""
    kinds: dict[Hashable, list[Window]] = {}
    for one in windows:
        kinds.setdefault(one.key, []).append(one)
    return {
        key: same
        for key, same in kinds.items()
        if key and (len(same) - 1) * len(same[0].nodes) >= least
    }


def _left(
    found: Sequence[Window], kinds: Mapping[Hashable, Sequence[Window]], facts: Facts
) -> Iterator[Window]:
    """Give what lies between layers, each stretch whole."""
    for is_layer, stretch in groupby(found, lambda one: one.key in kinds):
        if not is_layer:
            yield window([node for one in stretch for node in one.nodes], facts)


def _compiled(found: Sequence[Window], kinds: Mapping[Hashable, Sequence[Window]]) -> int:
    """Give the nodes' worth of work that is left when each kind is compiled once."""
    runs = [(kind, [*of]) for kind, of in groupby(found, lambda one: one.key in kinds)]
    left = [sum(len(one.nodes) for one in of) for kind, of in runs if not kind]
    left += [len(same[0].nodes) for same in kinds.values()]
    return sum(left) + _PIECE * len(left)


def _callee(name: str, layers: Sequence[Window]) -> Callee:
    return Callee(
        name=name,
        paths=tuple(map(_path, layers)),
        nodes=len(layers[0].nodes),
        severed=tuple(dict.fromkeys(cut for layer in layers for cut in _severed(layer))),
        held=frozenset(node.name for layer in layers for node in layer.nodes),
    )


def _severed(layer: Window) -> list[str]:
    """Name what could be fused across the end of a layer: `add | pow`."""
    inside = {*layer.nodes}
    return [
        f"{op_name(output)} | {op_name(user)}"
        for output in layer.outputs
        for user in output.users
        if user not in inside and user.op not in ("output", "call_module")
    ]


def _path(layer: Window) -> str:
    """Give the module of a list, `model.layers.3`, that most of a layer comes from; a label.

    A layer of ours may begin in the middle of one of the model's and end in that of the next.
    """
    paths = [path.split(".") for node in layer.nodes if (path := module_path(node))]
    around = Counter(".".join(path[:end]) for path in paths for end in range(1, len(path) + 1))
    listed = [path for path in around if path.rpartition(".")[2].isdigit()]
    return max(listed or around, key=lambda path: (around[path], len(path)), default="")

"""Compute linear layers of one input in one call.

Needs: linears.  Adds: nothing.  Graph: one call gives what several gave.

    q = moecc.linear(x, wq, None, kernel)
    k = moecc.linear(x, wk, None, kernel)
→
    q, k = moecc.linears(x, [wq, wk], [None, None], kernel)

For one token reading a small matrix takes less time than a call around it: threads have to meet
twice, and each call packs x anew. Bits stay those of single calls.
"""

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from moecc.codegen.native.linear import MOST
from moecc.passes.build import Builder
from moecc.passes.ir import Outcome, Program
from moecc.passes.options import Options
from moecc.passes.parameters import is_parameter
from moecc.passes.pattern import mutates


def fuse_linears(program: Program, options: Options) -> Outcome:
    """Put linear layers that read the same input into one call, the place of the first."""
    groups = [group for group in _groups(program) if len(group) > 1]
    for group in groups:
        _fuse(group)
    fused = sum(map(len, groups))
    note = f"{fused} of {len(program.linears)} layers in {len(groups)} calls" if groups else ""
    return Outcome(program=program, rewrites=len(groups), note=note)


def _groups(program: Program) -> Iterator[list[Node]]:
    """Give the calls that read one value with one kernel, with no write to memory in between.

    What is written may be the value, or memory that it shares.
    """
    open_groups: dict[object, list[Node]] = {}
    for node in program.gm.graph.nodes:
        if mutates(node):
            yield from open_groups.values()
            open_groups = {}
        elif node.target is torch.ops.moecc.linear.default and _early(node):
            x, _, _, kernel = node.args
            group = open_groups.setdefault((x, kernel), [])
            group.append(node)
            if len(group) == MOST:
                yield open_groups.pop((x, kernel))
    yield from open_groups.values()


def _early(node: Node) -> bool:
    """Tell whether a layer's parameters are there before anything is computed."""
    _, *parameters, _ = node.args
    return all(one is None or is_parameter(one) for one in parameters)


def _fuse(group: list[Node]) -> None:
    x, _, _, kernel = group[0].args
    weights, biases = [node.args[1] for node in group], [node.args[2] for node in group]
    build = Builder(group[0].graph, group[0])
    call = build.function(
        torch.ops.moecc.linears.default, x, weights, biases, kernel, name="linears"
    )
    outs = [
        build.function(operator.getitem, call, index, name="linear") for index in range(len(group))
    ]
    for node, out in zip(group, outs, strict=True):
        out.meta.update(node.meta)  # where it comes from, and the sizes that are known of it
        node.replace_all_uses_with(out)
        node.graph.erase_node(node)

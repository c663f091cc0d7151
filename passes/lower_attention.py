"""Hand the attention of a few query tokens to a kernel that reads each key and value once.

Needs: nothing.  Adds: attentions.  Graph: each such call is a `moecc.attention`, whose keys and
values are not repeated for the query heads that share them.

    keys = reshape(expand(getitem(cache, (:, :, None)), 1, 4, 8, 600, 128), 1, 32, 600, 128)
    scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=0.088)
→
    moecc.attention(q, cache, cached_values, mask, False, 0.088, "native: attention bfloat16 cpu")

That is decoding, where a cache is read for every token. Prompts stay torch's, as does what this
pass does not read, which is a miss.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moecc.codegen.native import attention
from moecc.passes.axes import View, leaves, over_own_axes, shape_of, tensor_of, through_layout
from moecc.passes.build import Builder
from moecc.passes.ir import Attention, Lowering, Miss, Outcome, Program
from moecc.passes.options import Options
from moecc.passes.pattern import mutates, op_name
from moecc.passes.sizes import known, same, same_shape
from moecc.passes.source import module_path
from moecc.runtime import attention as operator
from moecc.runtime.errors import BuildError, UnsupportedSpec

FEW = 8
"""Query tokens: a prompt of more computes enough to be torch's."""
_NAMES = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
)  # fmt: skip


def lower_attention(program: Program, options: Options) -> Outcome:
    """Replace attention over a cache, on CPUs."""
    graph = program.gm.graph
    calls = [one for one in graph.nodes if op_name(one) == "scaled_dot_product_attention"]
    meant = [one for one in calls if _is_short(one)]
    if not options.attention or options.kernels not in ("auto", "native"):
        return Outcome(program=program, note="off: torch computes attention")
    if program.trains and meant:
        return Outcome(program=program, note="off: gradients are wanted")
    misses: list[Miss] = []
    done: list[Attention] = []
    lowerings: dict[str, Lowering] = {}
    for node in meant:
        path = module_path(node)
        try:
            given = _arguments(node)
            kernel = attention.emit(_tensor(node).dtype)
        except (UnsupportedSpec, BuildError) as error:
            misses.append(Miss(where=path, why=f"torch computes attention: {error}"))
            continue
        operator.install(kernel.key, kernel.run)
        lowerings[kernel.key] = Lowering(block="attention", kernel=kernel.key, source=kernel.source)
        heads, shared = (int(_tensor(given[name]).shape[1]) for name in ("query", "key"))
        done.append(Attention(path=path, heads=heads, shared=shared, kernel=kernel.key))
        _replace(node, given, kernel.key)
    after = replace(
        program,
        attentions=(*program.attentions, *done),
        lowerings=(*program.lowerings, *lowerings.values()),
    )
    long = len(calls) - len(meant)
    note = f"{long} not of 1 to {FEW} query tokens on a CPU: torch computes them" if long else ""
    return Outcome(program=after, rewrites=len(done), misses=tuple(misses), note=note)


def _is_short(node: Node) -> bool:
    query = tensor_of(node.args[0] if node.args else node.kwargs.get("query"))
    tokens = known(query.shape[-2]) if query is not None and query.dim() > 1 else None
    return tokens is not None and tokens <= FEW and query is not None and query.is_cpu


def _tensor(node: Any) -> torch.Tensor:
    found = tensor_of(node)
    if found is None:
        raise UnsupportedSpec(f"{node} is no tensor")
    return found


def _arguments(node: Node) -> dict[str, Any]:
    """Name a call's arguments, with keys and values before they were repeated.

    Raises `UnsupportedSpec` for what kernels do not read.
    """
    given: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    query, key, value = (_tensor(given[name]) for name in _NAMES[:3])
    tensors = (query, key, value, _tensor(node))  # autocast changes the result's dtype
    if any(one.dim() != 4 or one.dtype != query.dtype for one in tensors):
        raise UnsupportedSpec("its tensors are not 4-d, in one dtype")
    if any(map(is_traceable_wrapper_subclass, tensors)):
        raise UnsupportedSpec("its tensors are not plain")
    if given.get("dropout_p") or isinstance(given.get("scale"), Node):
        raise UnsupportedSpec("it drops values, or its scale is computed")
    mask = given.get("attn_mask")
    if mask is not None and _tensor(mask).dtype not in (torch.bool, query.dtype):
        raise UnsupportedSpec(f"its mask is in {_tensor(mask).dtype}")
    spread = not given.get("enable_gqa") and not same(query.shape[1], key.shape[1])
    if spread or not all(same(query.shape[0], one.shape[0]) for one in (key, value)):
        raise UnsupportedSpec("batch or heads of query and key are broadcast")
    sources = [_before_repeat(given[name], node) for name in ("key", "value")]
    if same(*(_tensor(one).shape[1] for one in sources)):
        given["key"], given["value"] = sources
    heads, *shared = (known(_tensor(given[name]).shape[1]) for name in _NAMES[:3])
    if heads is None or shared[0] is None or shared[0] != shared[1] or heads % shared[0]:
        raise UnsupportedSpec(f"{shared} heads of keys and values serve {heads} of queries")
    depth = known(query.shape[3])
    if depth is None:
        raise UnsupportedSpec("the size of a head is not known")
    if given.get("scale") is None:
        given["scale"] = depth**-0.5
    return given


def _before_repeat(node: Node, end: Node) -> Node:
    """Go back to the heads that `node` repeats, each as often as there are queries to share it.

    `end` may read them in its place if nothing is written in between.
    """
    if op_name(node) == "repeat_interleave":
        times, dim = (*node.args[1:], *node.kwargs.values(), None, None)[:2]
        source, heads = node.args[0], isinstance(times, int) and dim in (1, -3)
        return source if heads and isinstance(source, Node) and _unwritten(node, end) else node
    whole = view = over_own_axes(node)
    found = node
    while (before := through_layout(view)) is not None:
        if _tensor(before.node).dtype != _tensor(node).dtype or not _unwritten(view.node, end):
            break
        view = before
        if _is_shared(whole, view):
            found = view.node
    return found


def _is_shared(whole: View, view: View) -> bool:
    """Tell whether heads of `view` are those of `whole`, some consecutive ones for each."""
    shape, own = shape_of(whole.node), shape_of(view.node)
    if len(own) != 4 or not same_shape((shape[0], *shape[2:]), (own[0], *own[2:])):
        return False
    (batch, heads, *rest), (own_batch, shared, *own_rest) = (
        [leaves(dim) for dim in one.dims] for one in (whole, view)
    )
    return [batch, *rest] == [own_batch, *own_rest] and heads[: len(shared)] == shared


def _unwritten(start: Node, end: Node) -> bool:
    """Tell whether nothing is written in place from one node to another."""
    while start is not end and not mutates(start):
        start = start.next
    return start is end


def _replace(node: Node, given: dict[str, Any], kernel: str) -> None:
    names = ("query", "key", "value", "attn_mask")
    tensors = [given.get(name) for name in names]
    build = Builder(node.graph, node)
    rest = (bool(given.get("is_causal")), float(given["scale"]), kernel)
    target = torch.ops.moecc.attention.default
    call = build.function(target, *tensors, *rest, name="attention")
    if _tensor(node).is_contiguous() and not _tensor(call).is_contiguous():
        call = build.method("contiguous", call)  # what follows may see it in another shape
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)

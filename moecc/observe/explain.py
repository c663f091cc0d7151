"""Find in a recording which values are a MoE block's, by their numbers, and check the structure.

With experts f_e, the block is one of

    out[t] = sum_k weights[t, k] * f_{ids[t, k]}(hidden[t])      chosen
    out[t] = sum_k f_{ids[t, k]}(weights[t, k] * hidden[t])      weighed on the input
    out[t] = sum_e gates[t, e] * f_e(hidden[t])                  gates, zero where not chosen

where ids beyond the last expert add nothing, or the hidden state itself, and `gates` may be a mask
[T, E] times a probability [T]. Whatever loop computed the sum, the values are among those that were
recorded before the first expert and after the last. Stand-ins for the experts make a wrong guess
give wrong numbers (`stand_ins`), and what the guess leaves out is checked too (`left_out`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.fx import Node

from moecc.observe.left_out import check_decisions, check_left_out
from moecc.observe.recorder import Recorder
from moecc.observe.stand_ins import Experts, expert_result
from moecc.observe.unrecordable import Unrecordable
from moecc.passes.pattern import op_name

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How tokens come to experts; either `ids` or `gates` is set."""

    ids: Node | None = None
    """[.., K], or [..] for one expert a token."""
    weights: Node | None = None
    """As many as ids; None when experts are summed unweighted."""
    weighs_input: bool = False
    """Weights scale what goes into the experts."""
    copies: bool = False
    """An id beyond the last expert stands for the token itself."""
    gates: Node | None = None
    """[.., E], zero for experts that are not chosen."""
    scale: Node | None = None
    """[..] times `gates`."""

    def nodes(self) -> list[Node]:
        """List what is set."""
        return [n for n in (self.ids, self.weights, self.gates, self.scale) if n is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Where a block's values are."""

    hidden: Node
    """[.., H] entering the experts."""
    routing: Routing
    output: Node
    """[.., H] the weighted sum."""


def explain(recorder: Recorder, results: Sequence[Node], experts: Experts) -> Explanation:
    """Explain the recording of a module; `results` are the nodes it returned.

    Raises `Unrecordable` with what does not fit.
    """
    nodes = list(recorder.graph.nodes)
    answers = [node for node in nodes if node.target is expert_result]
    if not answers:
        raise Unrecordable("its forward does not call the experts")
    behind = _downstream(answers)
    loose = _sized_by_values(nodes)
    before = [n for n in nodes if n not in behind and n not in loose and _tensor(n) is not None]
    sums = [node for node in nodes if node in behind and node.target is not expert_result]
    check_decisions(recorder.decisions)
    refused: Unrecordable | None = None
    for found in _search(before, sums, experts):
        try:
            check_left_out(nodes, found, results, recorder.decisions)
        except Unrecordable as error:
            refused = refused or error  # a part of the sum, perhaps: go on
        else:
            return found
    raise refused or Unrecordable(
        "its result is not a weighted sum of experts over any ids that it computed"
    )


def _tensor(node: Node) -> torch.Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) and node.op != "get_attr" else None


def _sized_by_values(nodes: Sequence[Node]) -> set[Node]:
    """Collect what has as many elements as there are nonzero ones somewhere.

    Such values may look like ids, [T] of them, until a weight is zero.
    """
    found = set[Node]()
    for node in nodes:
        name, index = op_name(node), node.args[1] if len(node.args) > 1 else None
        values = index.meta.get("example_value") if isinstance(index, Node) else None
        masks = isinstance(values, torch.Tensor) and values.dtype == torch.bool
        chosen = name in ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive")
        alone = name == "where" and len(node.args) == 1
        if (
            chosen
            or alone
            or (name == "getitem" and masks)
            or not found.isdisjoint(node.all_input_nodes)
        ):
            found.add(node)
    return found


def _downstream(start: list[Node]) -> set[Node]:
    found, waiting = set[Node](), list(start)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.users
    return found


def _search(before: list[Node], sums: list[Node], experts: Experts) -> Iterator[Explanation]:
    """Try hidden states, then routings; the latest fitting nodes come first."""
    width = experts.width
    for hidden in _hidden_states(before, width):
        rows = hidden.meta["example_value"].reshape(-1, width)
        ends = [node for node in sums if _is_float(node, rows.numel(), width)][::-1]
        for expected, routing in chain(
            _chosen(before, rows, experts), _gated(before, rows, experts)
        ):
            for output in ends:
                value = output.meta["example_value"].reshape(rows.shape)
                tolerance = TOLERANCE[value.dtype] * float(value.double().norm())
                if float((expected - value.double()).norm()) <= tolerance:
                    yield Explanation(hidden=hidden, routing=routing, output=output)


def _hidden_states(before: list[Node], width: int) -> Iterator[Node]:
    """Give the candidates, one for each different value, two-dimensional ones first."""
    seen: list[torch.Tensor] = []
    floats = [node for node in before if _is_float(node, 0, width)]
    for node in sorted(floats, key=lambda one: one.meta["example_value"].dim() != 2):
        value = node.meta["example_value"].reshape(-1, width)
        if not any(value.shape == one.shape and torch.equal(value, one) for one in seen):
            seen.append(value)
            yield node


def _is_float(node: Node, count: int, width: int) -> bool:
    value = _tensor(node)
    if value is None or value.dtype not in TOLERANCE or value.dim() < 2:
        return False
    return value.shape[-1] == width and count in (0, value.numel()) and value.numel() > 0


Guess = tuple[torch.Tensor, Routing]


def _chosen(before: list[Node], rows: torch.Tensor, experts: Experts) -> Iterator[Guess]:
    for ids in reversed(before):
        table = _table(ids, len(rows))
        if table is None or (table < 0).any() or (table >= 2 * experts.count).any():
            continue
        outside = (table >= experts.count)[..., None]
        terms = experts.chosen(rows, table).double()
        copied = terms + outside * rows[:, None].double()
        for weights in [*_weights(before, table), None]:
            scores = 1.0
            if weights is not None:
                scores = weights.meta["example_value"].reshape(*table.shape, 1).double()
            yield (terms * scores).sum(1), Routing(ids=ids, weights=weights)
            if outside.any():
                yield (copied * scores).sum(1), Routing(ids=ids, weights=weights, copies=True)
        for weights in _weights(before, table):
            scores = weights.meta["example_value"].reshape(*table.shape, 1)
            scaled = (rows[:, None] * scores).to(rows.dtype).reshape(-1, experts.width)
            total = experts.chosen(scaled, table.reshape(-1, 1)).double()
            summed = total.reshape(*table.shape, experts.width).sum(1)
            yield summed, Routing(ids=ids, weights=weights, weighs_input=True)


def _table(node: Node, tokens: int) -> torch.Tensor | None:
    """See integers as ids [T, K] if they can be that."""
    value = node.meta["example_value"]
    if value.is_floating_point() or value.dtype == torch.bool or value.numel() % tokens:
        return None
    active = value.numel() // tokens
    if active == 0 or (active > 1 and value.shape[-1] != active):
        return None
    return value.reshape(tokens, active).long()


def _weights(before: list[Node], table: torch.Tensor) -> Iterator[Node]:
    """Give what could weigh ids [T, K], latest first."""
    active = table.shape[1]
    for node in reversed(before):
        value = node.meta["example_value"]
        shaped = active == 1 or (value.dim() > 1 and value.shape[-1] == active)
        if value.is_floating_point() and value.numel() == table.numel() and shaped:
            yield node


def _gated(before: list[Node], rows: torch.Tensor, experts: Experts) -> Iterator[Guess]:
    for gates in reversed(before):
        value = gates.meta["example_value"]
        if value.numel() != len(rows) * experts.count or value.shape[-1] != experts.count:
            continue
        if not (value == 0).any():
            continue  # every expert for every token: not a choice
        table = value.reshape(len(rows), experts.count).double()
        total = rows.new_zeros(rows.shape, dtype=torch.float64)
        for number in range(experts.count):
            total += experts.one(number, rows).double() * table[:, number, None]
        yield total, Routing(gates=gates)
        for scale in reversed(before):
            scores = scale.meta["example_value"]
            if scores.is_floating_point() and scores.numel() == len(rows):
                scaled = total * scores.reshape(-1, 1).double()
                yield scaled, Routing(gates=gates, scale=scale)

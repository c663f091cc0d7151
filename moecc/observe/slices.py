"""Find experts that are parts of stacked parameters: `F.linear(x, self.w[e])` in a loop.

After a module ran for real, every second product of an expert is put into the recording as that
expert's result, so that it can be explained like a block whose experts are modules.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from moecc.codegen.activation import evaluate
from moecc.codegen.reference import split_gate_up
from moecc.observe.expert import Expert, read_expert
from moecc.observe.other_weights import check_only_multiplied
from moecc.observe.pieces import push_splits_through
from moecc.observe.products import Matrix, Product, read_product
from moecc.observe.recorder import Recorder, Slice
from moecc.observe.stand_ins import Experts, expert_result
from moecc.observe.unrecordable import Unrecordable


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """All experts of a block in its own parameters; `expert` is the first of them."""

    expert: Expert
    count: int


def find_stacked(recorder: Recorder, module: nn.Module) -> Stacked:
    """Put expert results into a recording; raises `Unrecordable` when there are none alike."""
    push_splits_through(recorder.graph)
    results: list[tuple[Product, Node, int, Expert]] = []
    for node in list(recorder.graph.nodes):
        product = read_product(node)
        if product is None or not _is_part(product.weight, module):
            continue
        try:
            expert, rows = read_expert(product)
        except Unrecordable:
            continue  # the first product of an expert, or a plain layer
        number = product.weight.offset // (expert.hidden * expert.intermediate)
        results.append((product, rows, number, _moved_to_first(expert, number)))
    kinds = {expert for *_, expert in results}
    if len(kinds) != 1:
        raise Unrecordable(f"it calls {len(kinds)} kinds of experts in its parameters")
    (expert,) = kinds
    paths = {one.path for one in (*expert.first, expert.second)}
    check_only_multiplied(recorder, _products(recorder), paths)
    for product, rows, number, _ in results:
        with recorder.graph.inserting_after(product.node):
            result = recorder.graph.call_function(expert_result, (number, rows))
        result.meta["example_value"] = product.node.meta["example_value"]
        product.node.replace_all_uses_with(result)
    size = module.get_parameter(expert.second.path).numel()
    return Stacked(expert=expert, count=size // (expert.hidden * expert.intermediate))


def _products(recorder: Recorder) -> set[Node]:
    return {node for node in recorder.graph.nodes if read_product(node) is not None}


def _is_part(matrix: Matrix, module: nn.Module) -> bool:
    return matrix.inputs * matrix.outputs < module.get_parameter(matrix.path).numel()


def _moved_to_first(expert: Expert, number: int) -> Expert:
    """Give the expert as if it were number 0, so that all compare equal."""

    def matrix(one: Matrix) -> Matrix:
        return replace(one, offset=one.offset - number * one.inputs * one.outputs)

    def bias(one: Slice) -> Slice:
        return replace(one, offset=one.offset - number * one.shape[0])

    return replace(
        expert,
        first=tuple(map(matrix, expert.first)),
        second=matrix(expert.second),
        first_bias=tuple(map(bias, expert.first_bias)),
        second_bias=None if expert.second_bias is None else bias(expert.second_bias),
    )


class RealExperts(Experts):
    """The experts as they are."""

    def __init__(self, module: nn.Module, stacked: Stacked) -> None:
        super().__init__(stacked.count, stacked.expert.hidden)
        self._expert = stacked.expert
        self._module = module

    def one(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """Compute one expert on rows [..., H]."""
        expert = self._expert
        parts = [
            F.linear(rows, self._matrix(matrix, number), self._bias(expert.first_bias, i, number))
            for i, matrix in enumerate(expert.first)
        ]
        leaves = split_gate_up(torch.cat(parts, dim=-1), expert)
        inner = evaluate(expert.activation, **leaves).to(rows.dtype)
        biases = () if expert.second_bias is None else (expert.second_bias,)
        return F.linear(inner, self._matrix(expert.second, number), self._bias(biases, 0, number))

    def _matrix(self, matrix: Matrix, number: int) -> torch.Tensor:
        flat = self._module.get_parameter(matrix.path).detach().reshape(-1)
        size = matrix.inputs * matrix.outputs
        part = flat[matrix.offset + number * size :][:size]
        if matrix.turned:
            return part.view(matrix.inputs, matrix.outputs).T
        return part.view(matrix.outputs, matrix.inputs)

    def _bias(self, biases: tuple[Slice, ...], which: int, number: int) -> torch.Tensor | None:
        if not biases:
            return None
        part = biases[which]
        flat = self._module.get_parameter(part.path).detach().reshape(-1)
        return flat[part.offset + number * part.shape[0] :][: part.shape[0]]

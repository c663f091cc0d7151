"""Learn how to run one block that calls its experts from Python: observe it, choose its kernel.

The recipe of a block is the same for all blocks that are alike; what differs are the tensors.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import mark_static

from moecc.codegen.activation import evaluate
from moecc.codegen.emit import choose, install_kernel
from moecc.codegen.reference import split_gate_up
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.observe.block import attributes, observe_modules, observe_stacked
from moecc.observe.expert import Expert, read_module
from moecc.observe.other_weights import give_other_weights
from moecc.observe.products import Matrix
from moecc.observe.recorder import Slice
from moecc.observe.rewrite import Weight, write_with
from moecc.observe.unrecordable import Unrecordable
from moecc.runtime import ops
from moecc.runtime.bank import Bank
from moecc.runtime.modules import named_modules
from moecc.runtime.schemes.scheme import Schemes

MARK = "_moecc"
"""The attribute of an adopted block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to run a block without its loop."""

    forms: dict[tuple[int, ...], Callable[..., Any]]
    """`forward(module, *inputs)` for each combination of input dimensions."""
    state: tuple[tuple[tuple[str, ...], str, Any], ...]
    """Path, name and value of the plain attributes that the functions took for constant."""
    expert: Expert
    kernel: Kernel
    declined: str
    """Why the kernel is not the one that was wanted."""


def learn(
    module: nn.Module, experts: Sequence[nn.Module], kernels: str, schemes: Schemes | None
) -> Recipe:
    """Observe a block whose experts are modules, or with none given parts of its parameters.

    Raises `Unrecordable` with the reason when its loop cannot be replaced.
    """
    if experts:
        (first,) = _copies([experts[0]], experts[0])
        expert = read_module(first)
        _check_modules(expert, first)
        module, *experts = _copies([module, *experts], module)
        give_other_weights(module, experts)
        forms = observe_modules(module, experts, expert)
        weights = _banked(expert)
        count = len(experts)
    else:
        (module,) = _copies([module], module)
        give_other_weights(module, ())
        forms, stacked = observe_stacked(module)
        expert, count = stacked.expert, stacked.count
        weights = _in_place(module, expert, count)
    kernel, declined = choose(_spec(module, expert, count, weights), kernels, schemes)
    install_kernel(kernel, kernels)
    call = _experts_call(kernel)
    inner = {one for each in experts for one in each.modules()}
    return Recipe(
        forms={form.dims: write_with(form.node, call, weights) for form in forms},
        state=tuple(
            (tuple(filter(None, path.split("."))), name, value)
            for path, child in named_modules(module)
            if child not in inner
            for name, value in attributes(child).items()
            if isinstance(value, (bool, int, float, str))
        ),
        expert=expert,
        kernel=kernel,
        declined="; ".join(declined),
    )


def _copies(modules: Sequence[nn.Module], around: nn.Module) -> list[nn.Module]:
    """Copy modules to observe, without hooks and in eval mode, parameters shared.

    What calls leave behind, such as counted loads, stays in the copies. Raises `Unrecordable` when
    they cannot be copied.
    """
    known: dict[int, Any] = {id(one): one for one in around.parameters()}
    try:
        copies = [copy.deepcopy(module, known) for module in modules]
    except Exception as error:  # whatever an attribute raises
        failed = Unrecordable(f"it cannot be copied to be observed: {error}")
        failed.routes = len(modules) > 1  # its experts were read already
        raise failed from error
    for module in copies[0].modules():
        module.training = False
        module._forward_hooks.clear()  # pyright: ignore[reportPrivateUsage]
        module._forward_pre_hooks.clear()  # pyright: ignore[reportPrivateUsage]
    return copies


Weights = tuple[Weight | None, ...]
"""gate_up, down, gate_up_bias, down_bias and up, as in `ExpertsFn`."""


def _check_modules(expert: Expert, module: nn.Module) -> None:
    matrices = (*expert.first, expert.second)
    if any(one.turned for one in matrices):
        raise Unrecordable("its experts store weights as [inputs, outputs]")
    if expert.interleaved and len(expert.first) > 1:
        raise Unrecordable("its experts interleave gate and up")
    for one in matrices:
        if module.get_parameter(one.path).numel() != one.inputs * one.outputs:
            raise Unrecordable("its experts multiply by a part of a parameter")


def _banked(expert: Expert) -> Weights:
    """Say where the tensors of experts that are modules will lie: in the block's mark."""
    bias = bool(expert.first_bias or expert.second_bias)
    names = ("gate_up", "down", *(("gate_up_bias", "down_bias") if bias else ()))
    weights = [Weight(path=f"{MARK}.{name}") for name in names]
    return (*weights, *[None] * (5 - len(weights)))


def bank_experts(
    block: nn.Module, experts: Sequence[nn.Module], expert: Expert
) -> dict[str, torch.Tensor]:
    """Move the parameters of expert modules into banks; a bias only one product has is zero else.

    Raises `InputError` when parameters are shared or hold no data.
    """
    paths = {
        "gate_up": [one.path for one in expert.first],
        "down": [expert.second.path],
        "gate_up_bias": [one.path for one in expert.first_bias],
        "down_bias": [expert.second_bias.path] if expert.second_bias else [],
    }
    parts = {
        name: [[_place(module, path) for path in wanted] for module in experts]
        for name, wanted in paths.items()
        if wanted
    }
    tensors = Bank(block, experts, parts).tensors
    if expert.first_bias or expert.second_bias:
        for product in ("gate_up", "down"):
            weight = tensors[product]
            tensors.setdefault(f"{product}_bias", weight.new_zeros(weight.shape[:2]))
    for tensor in tensors.values():
        mark_static(tensor)  # as parameters are, even with dynamic=True
    return tensors


def _place(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name


def _in_place(module: nn.Module, expert: Expert, count: int) -> Weights:
    """See the block's own parameters as [E, ., .]."""
    matrices = (*expert.first, expert.second)
    if any(one.offset for one in matrices):
        raise Unrecordable("its experts are not one after another in their parameters")
    if bool(expert.first_bias) != (expert.second_bias is not None) or len(expert.first_bias) > 1:
        raise Unrecordable("only some of its products have a bias")

    def matrix(one: Matrix) -> Weight:
        sizes = (one.inputs, one.outputs) if one.turned else (one.outputs, one.inputs)
        whole = module.get_parameter(one.path).shape == (count, *sizes)
        return Weight(path=one.path, shape=None if whole else (count, *sizes))

    def bias(one: Slice | None) -> Weight | None:
        return None if one is None else Weight(path=one.path, shape=(count, *one.shape))

    first, *up = (matrix(one) for one in expert.first)
    biases = (bias(next(iter(expert.first_bias), None)), bias(expert.second_bias))
    return (first, matrix(expert.second), *biases, up[0] if up else None)


def _spec(module: nn.Module, expert: Expert, count: int, weights: Weights) -> KernelSpec:
    return KernelSpec(
        hidden=expert.hidden,
        intermediate=expert.intermediate,
        experts=count,
        dtype=expert.dtype,
        activation=expert.activation,
        gated=expert.gated,
        interleaved=expert.interleaved,
        transposed=expert.first[0].turned,
        down_transposed=expert.second.turned,
        bias=weights[2] is not None,
        split=weights[4] is not None,
        device=next(module.parameters()).device.type,
    )


def _experts_call(kernel: Kernel) -> Callable[..., torch.Tensor]:
    """Make the call that stands in a block's function in the place of its loop.

    While Dynamo traces, it is the canonical form that every model is brought into.
    """
    spec = kernel.spec

    def experts(
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        up: torch.Tensor | None,
    ) -> torch.Tensor:
        ids = ids.to(torch.int64)
        if torch.compiler.is_dynamo_compiling():
            linear = torch.ops.moecc.expert_linear
            rows = linear(hidden, ids, gate_up, gate_up_bias, spec.transposed)
            if up is None:
                leaves = split_gate_up(rows, spec)
            else:
                leaves = {"gate": rows, "up": linear(hidden, ids, up, None, spec.transposed)}
            rows = evaluate(spec.activation, **leaves)
            terms = linear(rows, ids, down, down_bias, spec.down_transposed)
            return torch.ops.moecc.combine(terms, weights).to(hidden.dtype)
        vectors = (gate_up_bias, down_bias)
        return ops.run_experts(hidden, ids, weights, gate_up, down, *vectors, up, None, kernel.key)

    return experts

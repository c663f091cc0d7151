"""Find the experts of a model in memory, however it is written: run it, and see what blocks read.

The model, or without inputs each module of it that may be a block, on random ones, is compiled
with the passes of moecc and no inner backend. Whatever road a block takes to `moecc::experts`, the
tensors of that call are its experts. Their place in memory tells which parameters these are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from moecc import capture
from moecc.codegen.emit import spec_of
from moecc.codegen.spec import KernelSpec
from moecc.module_experts import candidates
from moecc.observe.inputs import Inputs, first_inputs, guess_shapes, makers
from moecc.runtime.errors import ModelError
from moecc.runtime.modules import named_modules, parameters_of
from moecc.runtime.watch import Use, watching
from moecc.transformers_experts import adopted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experts:
    """The experts of one block."""

    path: str
    """Of the module that holds all of them."""
    spec: KernelSpec
    active: int
    """K."""
    tensors: dict[str, torch.Tensor]
    """[E, ...], by the names of a record."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor lies in the memory of these."""
        return any(_lies_in(tensor, one) for one in self.tensors.values())


def find_experts(model: nn.Module, inputs: Sequence[Any], kernels: str) -> list[Experts]:
    """List the experts of an adopted model, block by block, in the order of its modules.

    Raises `ModelError` when there are none, or some are computed from parameters in every call.
    """
    uses = run_blocks(model, inputs, kernels)
    held = [
        (path, one)
        for path, module in named_modules(model)
        for one in parameters_of(module).values()
        if one is not None
    ]
    places = {id(one): number for number, (_, one) in enumerate(held)}
    found: dict[int, Experts] = {}
    for use in uses:
        within = [(path, one) for path, one in held if _lies_in(one, use.gate_up)]
        if within:
            place = min(places[id(one)] for _, one in within)
            found.setdefault(place, _experts(use, held))
    if not found:
        whys = "; ".join(f"{one.where}: {one.why}" for one in capture.take_notes())
        how = "" if inputs else "give offload the inputs of a call after the model, or "
        raise ModelError(
            f"no block of {type(model).__name__} was found whose experts are parameters"
            f"{f' ({whys})' if whys else ''}; {how}ask moecc why"
        )
    return [found[place] for place in sorted(found)]


def run_blocks(model: nn.Module, inputs: Sequence[Any], kernels: str) -> list[Use]:
    """Run a model compiled by moecc's passes; without inputs, what may be a block of it.

    Returns what its blocks read. K is 1 where it is an input of the block and nobody gave it.
    """
    options: dict[str, Any] = {"inner": "eager", "kernels": kernels}
    run = torch.compile(_call, backend="moecc", options=options)
    dynamo: Any = import_module("torch._dynamo.config")
    limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 10**6)
    with torch.random.fork_rng(), torch.no_grad(), dynamo.patch(limits), watching() as uses:
        if inputs:
            run(model, *inputs)
            return uses
        done: set[nn.Module] = set()
        for module in _modules(model):
            known = len(uses)
            if done.isdisjoint(module.modules()) and (given := _takes(module)):
                del uses[known:]
                run(module, *given)
                if len(uses) > known:
                    done.add(module)
                if len(given) > 1:
                    uses[known:] = [replace(use, active=1) for use in uses[known:]]
    return uses


def _call(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """List what has our kernels already, then what else may be a block, inner modules first."""
    yield from [module for module in model.modules() if module in adopted]
    yield from dict.fromkeys(module for _, module, _ in candidates(model))


def _takes(module: nn.Module) -> Inputs:
    """Make random inputs that a module takes; none if it takes none of those that blocks have."""
    for shape in guess_shapes(module):
        for make in makers(module, shape):
            inputs = first_inputs(make, shape)
            try:
                module(*(one.clone() for one in inputs))
            except Exception:  # whatever a module raises on inputs it does not take
                continue
            return inputs
    return ()


def _experts(use: Use, held: Sequence[tuple[str, nn.Parameter]]) -> Experts:
    paths: list[list[str]] = []
    for tensor in use.tensors.values():
        within = {id(one): one for _, one in held if _lies_in(one, tensor)}
        if sum(one.nbytes for one in within.values()) != tensor.nbytes:
            raise ModelError(
                f"the experts of {_common(paths) or 'a block'!r} are a part of parameters, or "
                "computed from them in every call, so they cannot be left on disk"
            )
        paths += [path.split(".") for path, one in held if id(one) in within]
    spec = spec_of(use.kernel)
    return Experts(path=_common(paths), spec=spec, active=use.active, tensors=use.tensors)


def _common(paths: Sequence[Sequence[str]]) -> str:
    """Give the path of the innermost module that holds all."""
    shared: list[str] = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _lies_in(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    start = memory.data_ptr()
    return tensor.device == memory.device and start <= tensor.data_ptr() < start + memory.nbytes

"""Observe one module that calls its experts in Python, and prove the rewrite on other inputs."""

import warnings
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_flatten

from moecc.observe.counts import sized_len
from moecc.observe.expert import Expert
from moecc.observe.explain import TOLERANCE, explain
from moecc.observe.inputs import (
    Inputs,
    Shape,
    first_inputs,
    guess_shapes,
    makers,
    other_inputs,
)
from moecc.observe.other_weights import check_reads_no_expert
from moecc.observe.recorder import Recorder
from moecc.observe.rewrite import put_experts, write
from moecc.observe.slices import RealExperts, Stacked, find_stacked
from moecc.observe.stand_ins import Experts, StandIns, replaced
from moecc.observe.unrecordable import Unrecordable
from moecc.runtime.modules import named_modules

_PLAIN: tuple[type, ...] = (
    bool,
    int,
    float,
    str,
    bytes,
    tuple,
    frozenset,
    type(None),
    torch.dtype,
    torch.device,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One way to call a block."""

    dims: tuple[int, ...]
    """Dimensions of each input."""
    node: Node
    """The experts' call in the rewritten graph: hidden [T, H], ids [T, K], weights [T, K]."""


def observe_modules(
    module: nn.Module, experts: Sequence[nn.Module], expert: Expert
) -> tuple[Form, ...]:
    """Rewrite the forward of a module whose experts are modules, for each input that it takes.

    Raises `Unrecordable` with the reason when it cannot be done for any.
    """
    device = next(module.parameters()).device
    stand_ins = StandIns(len(experts), expert.hidden, device)
    shape = Shape(hidden=expert.hidden, experts=len(experts), dtype=expert.dtype, device=device)

    def find(recorder: Recorder) -> Experts:
        check_reads_no_expert(recorder, module, experts)
        return stand_ins

    return _observe(
        module,
        shape,
        lambda recorder: replaced(experts, stand_ins, recorder),
        find,
        lambda recorder: recorder.routes(),
    )


def observe_stacked(module: nn.Module) -> tuple[tuple[Form, ...], Stacked]:
    """Rewrite the forward of a module whose experts are parts of its parameters.

    Raises `Unrecordable` with the reason when it cannot be done.
    """
    refused = Unrecordable("it has no weights")
    for shape in guess_shapes(module, experts=8):
        found: list[Stacked] = []

        def real(recorder: Recorder, found: list[Stacked] = found) -> Experts:
            found.append(find_stacked(recorder, module))
            return RealExperts(module, found[-1])

        try:
            forms = _observe(module, shape, lambda _: nullcontext(), real, _decides)
        except Unrecordable as error:
            refused = error if error.routes or not refused.routes else refused
            continue
        if len(set(found)) == 1:
            return forms, found[0]
        refused = Unrecordable("its experts are not the same for all inputs")
    raise refused


def _observe(
    module: nn.Module,
    shape: Shape,
    context: Callable[[Recorder | None], AbstractContextManager[None]],
    find: Callable[[Recorder], Experts],
    routes: Callable[[Recorder], bool],
) -> tuple[Form, ...]:
    forms: list[Form] = []
    refused = Unrecordable("its forward does not take one tensor, or three")
    for make in makers(module, shape):
        with _quiet():
            inputs = first_inputs(make, shape)
            recorder = Recorder(module, inputs)
            try:
                node = _record(module, recorder, inputs, context, find)
                with context(None):
                    for other in (inputs, *other_inputs(make, shape)):
                        _compare(module, write(node.graph), other)
                forms.append(Form(dims=tuple(one.dim() for one in inputs), node=node))
            except Exception as error:  # whatever a module raises on inputs it does not take
                failed = Unrecordable(_reason(error))
                failed.routes = routes(recorder)
                refused = failed if failed.routes or not refused.routes else refused
    if not forms:
        raise refused
    return tuple({form.dims: form for form in reversed(forms)}.values())


def _decides(recorder: Recorder) -> bool:
    """Tell whether Python went by what was chosen; other code may choose by scores, too."""
    return bool(recorder.decisions) and recorder.routes()


def _record(
    module: nn.Module,
    recorder: Recorder,
    inputs: Inputs,
    context: Callable[[Recorder | None], AbstractContextManager[None]],
    find: Callable[[Recorder], Experts],
) -> Node:
    """Run the forward, explain it, and put the experts' node in the place of the loop."""
    with context(None):
        module(*(one.clone() for one in inputs))  # some set attributes when first called
    state = plain_state(module)
    with context(recorder), sized_len(), recorder:
        result = module(*inputs)
    if plain_state(module) != state:
        raise Unrecordable("a call changes attributes of the module")
    leaves = tree_flatten(result)[0]
    ends = [recorder.node_of(one) for one in leaves if isinstance(one, torch.Tensor)]
    experts = find(recorder)
    node = put_experts(recorder, explain(recorder, ends, experts), result, experts.count)
    node.target = experts.weighted
    return node


def _reason(error: Exception) -> str:
    if isinstance(error, Unrecordable):
        return str(error)
    return f"its forward failed on random inputs with {type(error).__name__}: {error}"


def plain_state(module: nn.Module) -> tuple[tuple[str, str, object], ...]:
    """List the attributes of a module and what is in it: what a forward may go by.

    Numbers, strings and tuples by value; containers by what they hold; any other object by `id`.
    """
    return tuple(
        (path, name, _seen(value))
        for path, child in named_modules(module)
        for name, value in attributes(child).items()
    )


def _seen(value: Any) -> object:
    """Give what tells whether an attribute is as it was."""
    if isinstance(value, tuple):
        return tuple(map(_seen, cast(tuple[Any, ...], value)))
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        held = cast(dict[Any, Any], value).items()
        return tuple((id(key), id(one)) for key, one in held)
    if isinstance(value, (list, set)):
        return tuple(map(id, cast(Collection[Any], value)))
    return id(value)


def attributes(module: nn.Module) -> dict[str, Any]:
    """Give the attributes of a module that are its own or plain ones of its class, not torch's."""
    found: dict[str, Any] = {}
    for kind in reversed(type(module).__mro__):
        if issubclass(kind, nn.Module) and kind.__module__.partition(".")[0] != "torch":
            found |= {name: one for name, one in vars(kind).items() if isinstance(one, _PLAIN)}
    found |= module.__dict__
    return {name: one for name, one in found.items() if name[:2] != "__" and name not in _TORCHS}


_TORCHS = {name for name in nn.Module().__dict__ if name != "training"}
"""Where torch keeps parameters, modules and hooks."""


@contextmanager
def _quiet() -> Generator[None]:
    """Leave no trace in the caller's random numbers, gradients or warnings."""
    with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(0)
        yield


def _compare(module: nn.Module, function: Callable[..., Any], inputs: Inputs) -> None:
    expected, expected_form = tree_flatten(module(*(one.clone() for one in inputs)))
    got, form = tree_flatten(function(module, *inputs))
    if form != expected_form:
        raise Unrecordable("what it returns changes its form with its input")
    for one, other in zip(got, expected, strict=True):
        if not _alike(one, other):
            sizes = ", ".join(str(tuple(value.shape)) for value in inputs)
            raise Unrecordable(f"on inputs of {sizes} it does not compute what was recorded")


def _alike(got: Any, expected: Any) -> bool:
    if not isinstance(expected, torch.Tensor):
        return type(got) is type(expected) and got == expected
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        return False
    if got.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    wanted = expected.double()
    tolerance = TOLERANCE[expected.dtype]
    error, size = (float((one * one).sum()) ** 0.5 for one in (got.double() - wanted, wanted))
    if error > tolerance * size + 1e-30:
        return False
    if wanted.dim() < 2 or not wanted.numel():
        return True
    # An expert that few tokens chose is lost in the sum over all of them, in half precision.
    errors, sizes = ((one * one).sum(-1).sqrt() for one in (got.double() - wanted, wanted))
    return bool((errors <= 4 * tolerance * sizes + tolerance * sizes.mean() / 2 + 1e-30).all())

"""Take over the experts of modules that call them one by one.

Such a block calls its experts from a Python loop, which Dynamo breaks up or unrolls. When a model
is compiled, every module that holds modules of one class, or stacked parameters, is observed
(`moecc.observe`). Where its forward is a weighted sum of experts, its class gets a dispatcher in
front of forward: while our backend traces, the observed function with one call of experts runs
instead of the loop, and outside of Dynamo too, with our kernel. Every other instance, backend and
call gets the forward as it was. Experts that are modules have their parameters moved into one bank
for each product (`moecc.runtime.bank`).
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moecc.module_recipes import MARK, Recipe, bank_experts, learn
from moecc.observe.block import plain_state
from moecc.observe.unrecordable import Unrecordable
from moecc.passes.options import Options
from moecc.runtime.errors import InputError, StrictError
from moecc.runtime.modules import children_of, has_hooks, named_modules, parameters_of
from moecc.runtime.offload.stand_in import is_stand_in, refuse_absent
from moecc.transformers_experts import Road, adopted, is_recorded


class Raised:
    """What an adopted block carries: its recipe, and the banks of experts that are modules."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor
    down_bias: torch.Tensor

    def __init__(
        self, kind: type[nn.Module], recipe: Recipe, banks: dict[str, torch.Tensor]
    ) -> None:
        self.kind, self.recipe = kind, recipe
        self.__dict__.update(banks)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as None: a copy of the model is one that was not adopted."""
        return type(None), ()


_forwards: dict[type[nn.Module], tuple[Callable[..., Any], bool]] = {}
"""The forward of every class that has our dispatcher in front, and whether it was a base's."""


def adopt(
    model: nn.Module,
    options: Options,
    traced_by_us: Callable[[], bool],
    note: Callable[[str, str], None],
) -> None:
    """Raise every block of a model that can be; `note` takes path and reason of those that cannot.

    A module that merely holds alike children, such as a stack of layers, is not worth a note.
    """
    done: set[nn.Module] = set()
    recipes: dict[Any, Recipe | Unrecordable] = {}
    for path, module, experts in candidates(model):
        if MARK in module.__dict__:
            done.update(experts or [module])
        if done.intersection([*experts, *_children(module), module]):
            continue  # the module inside this one that holds the experts was raised
        if any(map(is_stand_in, module.parameters())):
            continue  # a loop over NaN shows nothing
        try:
            _raise(path, module, experts, options, recipes)
        except (Unrecordable, InputError) as error:
            if isinstance(error, InputError) or error.routes:
                note(path or type(module).__name__, f"its experts stay a loop: {error}")
            continue
        except Exception as error:  # no model may fail to compile because of how it is built
            why = f"it could not be looked at: {type(error).__name__}: {error}"
            note(path or type(module).__name__, why)
            continue
        done.update(experts or [module])
        _put_in_front(type(module), traced_by_us, note)


def release(model: nn.Module) -> None:
    """Give the blocks of a model their own forwards back; parameters stay where they are."""
    for module in model.modules():
        if module.__dict__.pop(MARK, None) is not None:
            adopted.pop(module, None)
    in_use = Counter(type(module) for module in adopted)
    for kind in [kind for kind in _forwards if not in_use[kind]]:
        own, inherited = _forwards.pop(kind)
        if inherited:
            del kind.forward
        else:
            kind.forward = own


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Sequence[nn.Module]]]:
    """List modules that could be blocks, inner ones first, with what could be their experts.

    Either they hold several modules of one class, directly or in a container, or several stacked
    parameters; then the experts are parts of those, and no modules are listed.
    """
    for path, module in reversed(named_modules(model)):
        own = getattr(type(module), "forward", None)
        if own in (None, nn.Module.forward, nn.Sequential.forward):
            continue  # a mere container, or scripted
        if any(one in adopted and MARK not in one.__dict__ for one in module.modules()):
            continue  # transformers' own experts
        for holder in (module, *_children(module)):
            if holder is not module and not isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
                continue
            kinds = Counter(map(type, _children(holder))).most_common(1)
            if kinds and kinds[0][1] > 1 and kinds[0][0] not in _NO_EXPERTS:
                yield path, module, [one for one in _children(holder) if type(one) is kinds[0][0]]
        near = [weight for one in (module, *_children(module)) for weight in _stacked(one)]
        if len(near) > 1:
            yield path, module, ()


_NO_EXPERTS: set[type[nn.Module]] = {nn.Linear, nn.Dropout, nn.LayerNorm, nn.Embedding, nn.Identity}
_LAYERS = (nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention, nn.Bilinear)


def _stacked(module: nn.Module) -> list[nn.Parameter]:
    """List parameters that a module multiplies by in its own way."""
    if isinstance(module, _LAYERS) or type(module).__module__.startswith("torch.nn.modules.conv"):
        return []
    return [one for one in parameters_of(module).values() if one is not None and one.dim() >= 2]


def _raise(
    path: str,
    module: nn.Module,
    experts: Sequence[nn.Module],
    options: Options,
    recipes: dict[Any, Recipe | Unrecordable],
) -> None:
    """Observe a block, or use what was learned from one like it; bank its experts and mark it."""
    schemes = options.schemes(path)
    key = (type(module), _kind(module), bool(experts), schemes)
    if key not in recipes:
        try:
            recipes[key] = learn(module, experts, options.kernels, schemes)
        except Unrecordable as error:
            recipes[key] = error
    recipe = recipes[key]
    if isinstance(recipe, Unrecordable):
        raise recipe
    if why := _obstacle(module, experts):
        raise InputError(why)
    banks = bank_experts(module, experts, recipe.expert) if experts else {}
    setattr(module, MARK, Raised(type(module), recipe, banks))
    adopted[module] = Road(options, schemes, recipe.kernel, declined=recipe.declined)


def _obstacle(module: nn.Module, experts: Sequence[nn.Module]) -> str:
    """Say why a block that could be raised as it was observed must not be, or nothing."""
    if any(map(has_hooks, module.modules())):
        return "it or its experts have hooks, which a rewrite would not call"
    if any("forward" in one.__dict__ for one in module.modules()):
        return "a forward was put on the module itself, around that of its class"
    if module.training:
        return "it is in training mode; call eval() before torch.compile"
    if len({_kind(one) for one in experts}) > 1:
        return "its experts are not all alike"
    return ""


def _put_in_front(
    kind: type[nn.Module], traced_by_us: Callable[[], bool], note: Callable[[str, str], None]
) -> None:
    """Put the dispatcher before the forward of a class, once."""
    if kind in _forwards:
        return
    own = kind.forward
    _forwards[kind] = own, "forward" not in vars(kind)

    @torch.compiler.assume_constant_result
    def is_ours() -> bool:
        return traced_by_us()

    @torch.compiler.assume_constant_result
    def refuse(why: str) -> bool:
        note(kind.__name__, why)
        return True

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raised: Raised | None = getattr(self, MARK, None)
        if raised is None or raised.kind is not kind:  # or a subclass calls super().forward()
            return own(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            if not is_ours():
                return own(self, *args, **kwargs)
            why = _refusal(self, raised.recipe, args, kwargs)
            if why and refuse(why):
                return own(self, *args, **kwargs)
            return raised.recipe.forms[_dims(args)](self, *args)
        return _run_eager(self, own, raised, args, kwargs)

    kind.forward = forward


def _run_eager(
    module: nn.Module, own: Callable[..., Any], raised: Raised, args: Any, kwargs: Any
) -> Any:
    road = adopted.get(module)
    if road is None or is_recorded():
        refuse_absent(module, "calls are being recorded or transformed")
        return own(module, *args, **kwargs)
    why = _refusal(module, raised.recipe, args, kwargs)
    road.why = why or road.declined
    if road.why and road.options.strict:
        raise StrictError(f"strict=True and {type(module).__name__} falls back: {road.why}")
    if why:
        refuse_absent(module, why)
        road.own_calls += 1
        return own(module, *args, **kwargs)
    road.calls += 1
    return raised.recipe.forms[_dims(args)](module, *args)


def _refusal(module: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: Any) -> str:
    """Say why a call is not one that was observed, or nothing."""
    if kwargs or any(type(one) not in (torch.Tensor, nn.Parameter) for one in args):
        return "it is called with other arguments than the tensors it was observed with"
    if _dims(args) not in recipe.forms:
        return f"it was not observed with inputs of {_dims(args)} dimensions"
    if any(one.is_floating_point() and one.dtype != recipe.expert.dtype for one in args):
        return f"its input is not {recipe.expert.dtype}, as its experts are"
    if torch.is_grad_enabled():
        wanted = any(one.requires_grad for one in args)
        if wanted or any(parameter.requires_grad for parameter in module.parameters()):
            return "gradients are wanted, and fused experts have none; run under torch.no_grad()"
    for path, name, value in recipe.state:
        owner: Any = module
        for part in path:
            owner = getattr(owner, part)
        if getattr(owner, name) != value:
            return f"{'.'.join((*path, name))} is not {value!r} any more"
        if has_hooks(owner):
            return "a module in it has hooks, which a rewrite would not call"
    return ""


def _dims(args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple([one.dim() for one in args])


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in children_of(module).values() if child is not None]


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Describe what a module's forward can go by: classes, plain attributes, shapes, dtypes."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return (
        tuple((path, type(child)) for path, child in named_modules(module)),
        plain_state(module),
        tuple((path, one.shape, one.dtype, str(one.device)) for path, one in tensors),
    )

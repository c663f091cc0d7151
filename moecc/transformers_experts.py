"""Take over the experts of transformers models at the one function they all go through.

64 of 72 MoE families call `ExpertsInterface.get_interface(...)` inside `*Experts.forward`. While
our backend traces, it hands out `canonical_forward`, which writes the experts as two
`moecc.expert_linear` and a `moecc.combine` with the model's own activation between them; the eager
loop, `batched_mm` and `grouped_mm` become alike. Outside Dynamo it hands out our kernels, for
adopted models only. Everyone else gets what they would have got.
"""

import functools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter, Node, Tracer

from moecc.codegen.emit import choose
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.passes.activation import UnreadableActivation, read_activation
from moecc.passes.options import Options
from moecc.runtime import ops

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MARK = "_moecc"
_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "down_proj")


@dataclass(slots=True)
class Road:
    """How one adopted experts module runs outside Dynamo."""

    options: Options
    kernel: Kernel | None = None
    made_for: tuple[Any, ...] = ()
    why: str = ""
    """Why the model's own code runs instead, or why a slower kernel does."""
    calls: int = 0
    own_calls: int = 0


adopted: "weakref.WeakKeyDictionary[nn.Module, Road]" = weakref.WeakKeyDictionary()
"""Experts modules of models that were compiled with our backend."""


def adopt(model: nn.Module, options: Options) -> None:
    """Let the experts of a model use our kernels outside Dynamo."""
    for module in model.modules():
        if all(hasattr(module, name) for name in _ATTRIBUTES):
            adopted[module] = Road(options)


def release(model: nn.Module) -> None:
    """Give an adopted model its own experts back."""
    for module in model.modules():
        adopted.pop(module, None)


def install(traced_by_us: Callable[[], bool], note: Callable[[str, str], None]) -> None:
    """Put our dispatcher before `ExpertsInterface.get_interface`, once transformers is imported.

    `traced_by_us` tells whether our backend is tracing; `note` takes what has to be reported.
    """
    integration = sys.modules.get("transformers.integrations.moe")
    interface = getattr(integration, "ExpertsInterface", None)
    if interface is None or hasattr(interface.get_interface, _MARK):
        return
    original = interface.get_interface

    @torch.compiler.assume_constant_result
    def is_ours() -> bool:
        return traced_by_us()

    @torch.compiler.assume_constant_result
    def refuse(name: str, why: str) -> bool:  # a module as argument would tie the graph to it
        note(name, why)
        return True

    @functools.wraps(original)
    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = original(self, *args, **kwargs)
        if not torch.compiler.is_dynamo_compiling():
            return functools.partial(_run_eager, own) if adopted else own
        if not is_ours():
            return own

        def traced(
            module: nn.Module, hidden_states: Any, top_k_index: Any, top_k_weights: Any
        ) -> Any:
            why = _refusal(module)
            if _wants_grad(module, hidden_states) or (why and refuse(type(module).__name__, why)):
                return own(module, hidden_states, top_k_index, top_k_weights)
            return canonical_forward(module, hidden_states, top_k_index, top_k_weights)

        return traced

    setattr(get_interface, _MARK, True)
    interface.get_interface = get_interface


def canonical_forward(
    module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Write the experts so that every model looks alike; the activation stays the model's own."""
    bias = module.has_bias
    first = module.gate_up_proj if module.has_gate else module.up_proj
    first_bias = (
        (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias) if bias else None
    )
    second_bias = module.down_proj_bias if bias else None
    turned = bool(module.is_transposed)
    rows = torch.ops.moecc.expert_linear(hidden, ids, first, first_bias, turned)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    terms = torch.ops.moecc.expert_linear(rows, ids, module.down_proj, second_bias, turned)
    if getattr(module, "has_post_expert_norm", False):
        terms = module.post_expert_norm(terms)
    return torch.ops.moecc.combine(terms, weights).to(hidden.dtype)


def _wants_grad(module: Any, hidden: torch.Tensor) -> bool:
    wants = hidden.requires_grad or module.down_proj.requires_grad
    return torch.is_grad_enabled() and wants


def _refusal(module: Any) -> str:
    """Say why a module's experts are not ours to take, or nothing."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    for weight in (first, module.down_proj):
        if type(weight) not in (torch.Tensor, nn.Parameter):
            return f"expert weights are {type(weight).__name__}, which moecc does not read"
        if weight.dtype not in _FLOATS:
            return f"expert weights are {weight.dtype}, which moecc does not read"
        if weight.dim() != 3:
            return f"expert weights have {weight.dim()} dimensions, not [E, ., .]"
    return ""


def _run_eager(
    own: Callable[..., torch.Tensor],
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run adopted experts with our kernel, and everyone else's as they are."""
    road = adopted.get(module)
    if road is None or torch.compiler.is_compiling():
        return own(module, hidden_states, top_k_index, top_k_weights)
    plain = type(hidden_states) is torch.Tensor and not _wants_grad(module, hidden_states)
    kernel = _kernel(module, road) if plain else None
    if kernel is None:
        road.own_calls += 1
        return own(module, hidden_states, top_k_index, top_k_weights)
    road.calls += 1
    ops.calls[kernel.key] += 1
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return kernel.run(
        hidden_states,
        top_k_index,
        top_k_weights,
        getattr(module, first),
        cast(torch.Tensor, module.down_proj),
        getattr(module, f"{first}_bias", None) if module.has_bias else None,
        getattr(module, "down_proj_bias", None) if module.has_bias else None,
    )


def _kernel(module: Any, road: Road) -> Kernel | None:
    """Choose the module's kernel, again only when its weights changed kind."""
    down = cast(torch.Tensor, module.down_proj)
    kind = (type(down), down.dtype, down.device.type, down.shape)
    if road.made_for != kind:
        road.made_for, road.kernel, road.why = kind, None, _refusal(module)
        if getattr(module, "has_post_expert_norm", False):
            road.why = "a norm follows each expert, which kernels do not have"
        if not road.why:
            road.kernel, road.why = _choose(module, road.options)
    return road.kernel


def _choose(module: Any, options: Options) -> tuple[Kernel | None, str]:
    rows = (module.gate_up_proj if module.has_gate else module.up_proj).shape
    first = rows[2] if module.is_transposed else rows[1]
    try:
        activation = read_activation(_trace(module, first))
    except UnreadableActivation as error:
        return None, f"the activation is not one that kernels compute: {error}"
    experts, *sizes = module.down_proj.shape
    inner, outer = sizes if module.is_transposed else sizes[::-1]
    spec = KernelSpec(
        hidden=outer,
        intermediate=inner,
        experts=experts,
        dtype=module.down_proj.dtype,
        activation=activation.expr,
        gated=activation.gated,
        interleaved=activation.interleaved,
        transposed=bool(module.is_transposed),
        bias=bool(module.has_bias),
        device=module.down_proj.device.type,
    )
    kernel, declined = choose(spec, options.kernels)
    return kernel, "; ".join(declined)


class _Between(nn.Module):
    """What a model does between its experts' two products, as a module that can be traced."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        experts: Any = self.experts
        return experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


class _Shapes(Interpreter):
    def run_node(self, n: Node) -> Any:
        n.meta["example_value"] = value = super().run_node(n)
        return value


def _trace(module: nn.Module, width: int) -> Node:
    """Trace the activation on one row of `width`; return its last node."""
    between = _Between(module)
    try:
        graph: Graph = _Tracer().trace(between)
        _Shapes(GraphModule(between, graph)).run(torch.zeros(1, width))
    except Exception as error:  # whatever a model's own code raises when traced with a proxy
        raise UnreadableActivation(None, f"tracing it failed with {error!r}") from error
    return cast(Node, graph.output_node().args[0])

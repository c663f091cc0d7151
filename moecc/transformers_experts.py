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

from moecc.codegen.emit import choose, install_kernel
from moecc.codegen.spec import Kernel, KernelSpec
from moecc.passes.activation import UnreadableActivation, read_activation
from moecc.passes.options import Options
from moecc.passes.pattern import FLOATS
from moecc.runtime import ops
from moecc.runtime.errors import StrictError
from moecc.runtime.modules import named_modules
from moecc.runtime.offload.stand_in import refuse_absent
from moecc.runtime.schemes.scheme import Schemes

_MARK = "_moecc"
_ROLES = {
    "hidden_states": 0,
    **dict.fromkeys(("top_k_index", "router_indices", "selected_experts"), 1),
    **dict.fromkeys(("top_k_weights", "routing_weights"), 2),
}
"""What families call the inputs of their experts, by position."""
_THEIRS = (None, "eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")
"""Implementations that all mean the same computation."""
_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "down_proj")


@dataclass(slots=True)
class Road:
    """How one adopted experts module runs outside Dynamo."""

    options: Options
    schemes: Schemes | None = None
    """What the weights of its products are quantized to."""
    kernel: Kernel | None = None
    made_for: tuple[Any, ...] = ()
    declined: str = ""
    """Why there is no kernel, or a slower one."""
    why: str = ""
    """Why the latest call ran the model's own code, or a slower kernel."""
    calls: int = 0
    own_calls: int = 0


adopted: "weakref.WeakKeyDictionary[nn.Module, Road]" = weakref.WeakKeyDictionary()
"""Experts modules of models that were compiled with our backend."""


def adopt(model: nn.Module, options: Options) -> None:
    """Let the experts of a model use our kernels outside Dynamo."""
    for path, module in named_modules(model):
        known = adopted.get(module)
        if known is not None and known.options == options:
            continue  # compiled again: keep counting
        if is_experts(module):
            adopted[module] = Road(options, options.schemes(path))


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module is a block's experts as transformers writes them."""
    return all(hasattr(module, name) for name in _ATTRIBUTES)


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
    def get_interface(self: Any, implementation: Any, *args: Any, **kwargs: Any) -> Any:
        own = original(self, implementation, *args, **kwargs)
        if implementation not in _THEIRS:
            return own  # somebody registered an implementation of their own
        if not torch.compiler.is_dynamo_compiling():
            return functools.partial(_run_eager, own) if adopted else own
        if not is_ours():
            return own

        def traced(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            inputs = _in_order(args, kwargs)
            why = _refusal(module, inputs)
            if why and refuse(type(module).__name__, why):
                return own(module, *args, **kwargs)
            return canonical_forward(module, *inputs)

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
    normed = getattr(module, "has_post_expert_norm", False)
    rows, chosen, shares = (
        _one_row_a_choice(hidden, ids, weights) if normed else (hidden, ids, weights)
    )
    rows = torch.ops.moecc.expert_linear(rows, chosen, first, first_bias, turned)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    terms = torch.ops.moecc.expert_linear(rows, chosen, module.down_proj, second_bias, turned)
    out = torch.ops.moecc.combine(terms, shares)
    out = _sum_normed(module, out, weights) if normed else out
    return out.to(hidden.dtype)


def _one_row_a_choice(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make every choice a token with one expert: the block's sum is then that expert's output.

    [T, H], [T, K], [T, K] → [T*K, H], [T*K, 1], [T*K, 1]. A norm of each expert's output comes
    before the weighted sum, and so has to stay outside of the block.
    """
    chosen = ids.reshape(-1, 1)
    rows = hidden.repeat_interleave(ids.shape[1], dim=0)
    return rows, chosen, torch.ones_like(chosen, dtype=weights.dtype)


def _sum_normed(module: Any, outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Norm each expert's output [T*K, H] and give the weighted sum over k."""
    terms = module.post_expert_norm(outputs)
    wide = torch.promote_types(terms.dtype, torch.float32)
    terms = terms.to(wide).view(*weights.shape, terms.shape[-1]) * weights.to(wide).unsqueeze(-1)
    return terms.sum(dim=1).to(outputs.dtype)


def _in_order(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Give hidden states, ids and weights in this order; nothing for any other call."""
    places = dict(enumerate(args))
    for name, value in kwargs.items():
        place = _ROLES.get(name, -1)
        if place < 0 or place in places:
            return ()
        places[place] = value
    return tuple(places[i] for i in range(3)) if sorted(places) == [0, 1, 2] else ()


def _refusal(module: Any, inputs: tuple[Any, ...]) -> str:
    """Say why a call of a module's experts is not ours to take, or nothing."""
    if len(inputs) != 3:
        return "its forward is not called with hidden states, ids and weights alone"
    hidden, ids, weights = inputs
    if type(hidden) not in (torch.Tensor, nn.Parameter):
        return f"hidden states are {type(hidden).__name__}, which moecc does not read"
    first = module.gate_up_proj if module.has_gate else module.up_proj
    for weight in (first, module.down_proj):
        if type(weight) not in (torch.Tensor, nn.Parameter):
            return f"expert weights are {type(weight).__name__}, which moecc does not read"
        if weight.dtype not in FLOATS:
            return f"expert weights are {weight.dtype}, which moecc does not read"
        if weight.dim() != 3 or weight.stride(-1) != 1:
            return "expert weights are not [E, ., .] with contiguous rows"
    if ids.dim() != 2 or weights.shape != ids.shape or not weights.is_floating_point():
        return "ids and weights are not both [T, K]"
    if torch.is_grad_enabled():
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if trained or hidden.requires_grad or weights.requires_grad:
            return "gradients are wanted, and fused experts have none; run under torch.no_grad()"
    return ""


def _run_eager(
    own: Callable[..., torch.Tensor], module: nn.Module, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Run adopted experts with our kernel, and everyone else's as they are."""
    road = adopted.get(module)
    inputs = _in_order(args, kwargs)
    if road is None:
        return own(module, *args, **kwargs)
    if is_recorded():
        refuse_absent(module, "calls are being recorded or transformed")
        return own(module, *args, **kwargs)
    why = _refusal(module, inputs)
    kernel = None if why else _kernel(module, road)
    road.why = why or road.declined
    if road.why and road.options.strict:
        raise StrictError(f"strict=True and {type(module).__name__} falls back: {road.why}")
    if kernel is None:
        refuse_absent(module, road.why)
        road.own_calls += 1
        return own(module, *args, **kwargs)
    road.calls += 1
    return _run_kernel(kernel, module, *inputs)


def _run_kernel(
    kernel: Kernel, module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    normed = getattr(module, "has_post_expert_norm", False)
    inputs = _one_row_a_choice(hidden, ids, weights) if normed else (hidden, ids, weights)
    out = ops.run_experts(
        *inputs,
        getattr(module, first),
        cast(torch.Tensor, module.down_proj),
        getattr(module, f"{first}_bias", None) if module.has_bias else None,
        getattr(module, "down_proj_bias", None) if module.has_bias else None,
        None,
        None,
        kernel.key,
    )
    return _sum_normed(module, out, weights) if normed else out


def is_recorded() -> bool:
    """Tell whether somebody records or transforms calls; kernels are invisible to them.

    functorch (vmap, jvp), a tracer (jit, export), or a dispatch mode (make_fx, FLOP counters).
    """
    from torch._C._functorch import peek_interpreter_stack
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode

    stack: Any = peek_interpreter_stack()
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore
    return tracing or stack is not None or is_in_torch_dispatch_mode()


def _kernel(module: Any, road: Road) -> Kernel | None:
    """Choose the module's kernel, again only when its weights or its activation changed."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    weights = tuple((w.dtype, w.device.type, w.shape) for w in (first, module.down_proj))
    kind = (weights, id(getattr(module, "act_fn", None)), module.is_transposed)
    if road.made_for != kind:
        road.made_for = kind
        road.kernel, road.declined = _choose(module, road)
    return road.kernel


def _choose(module: Any, road: Road) -> tuple[Kernel | None, str]:
    first = module.gate_up_proj if module.has_gate else module.up_proj
    try:
        spec = experts_spec(module, first, module.down_proj)
    except UnreadableActivation as error:
        return None, f"the activation is not one that kernels compute: {error}"
    kernel, declined = choose(spec, road.options.kernels, road.schemes)
    install_kernel(kernel, road.options.kernels)
    return kernel, "; ".join(declined)


def experts_spec(module: Any, first: torch.Tensor, second: torch.Tensor) -> KernelSpec:
    """Say what kernel a transformers experts module with these weights needs.

    Raises `UnreadableActivation` when its activation is not one that kernels compute.
    """
    turned = bool(module.is_transposed)
    activation = read_activation(_trace(module, first.shape[2] if turned else first.shape[1]))
    experts, *sizes = second.shape
    inner, outer = sizes if turned else sizes[::-1]
    return KernelSpec(
        hidden=outer,
        intermediate=inner,
        experts=experts,
        dtype=second.dtype,
        activation=activation.expr,
        gated=activation.gated,
        interleaved=activation.interleaved,
        transposed=turned,
        down_transposed=turned,
        bias=bool(module.has_bias),
        device="cpu" if second.is_meta else second.device.type,
    )


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

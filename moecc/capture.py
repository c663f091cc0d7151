"""Let the backend see MoE blocks that Dynamo would break up, and models that bypass it.

Installed when torch looks the backend up, and never before: importing moecc changes nothing.

1. While *our* backend traces, transformers' experts are written in a canonical form
   (`moecc.transformers_experts`). Other backends in the same process see what they always saw.
2. `torch.compile(model).generate()` runs the original module outside Dynamo, and so does
   transformers' prefill when it compiles only decode. Models handed to torch.compile with our
   backend are therefore *adopted*: their experts use moecc's kernels outside Dynamo too.

Both lean on private names of torch. A name that is gone switches its part off, and every report
says so; matching by structure still works.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moecc import budgets, module_experts, one_hots, parallel, transformers_experts
from moecc.lenders import check_settled
from moecc.passes.ir import Miss
from moecc.passes.options import Options

_notes: list[Miss] = []
_missing: list[Miss] = []
_backend: Callable[..., Any] | None = None


def install(backend: Callable[..., Any]) -> None:
    """Set capture up for `backend`, once, by hooking into Dynamo and transformers."""
    global _backend
    if _backend is not None:
        return
    _backend = backend
    try:
        from torch._dynamo.eval_frame import OptimizeContext

        _hook_compile(OptimizeContext)
    except (ImportError, AttributeError) as error:
        why = f"torch {torch.__version__} has no OptimizeContext ({error}); models are not adopted"
        _missing.append(Miss(where="capture", why=why))
    transformers_experts.install(traced_by_us, note)


def adopt(model: torch.nn.Module, options: Options) -> None:
    """Let the experts of a model use our kernels, outside Dynamo too.

    Raises `OptionError` when experts were lent with other options.
    """
    check_settled(model, options)
    options = budgets.resolve(model, options)
    transformers_experts.install(traced_by_us, note)  # transformers may be younger than `install`
    transformers_experts.adopt(model, options)
    parallel.share_out(model, options)
    one_hots.adopt(model, traced_by_us)
    module_experts.adopt(model, options, traced_by_us, note)


def release(model: torch.nn.Module) -> None:
    """Give an adopted model its own experts back."""
    transformers_experts.release(model)
    module_experts.release(model)
    one_hots.release(model)


def note(where: str, why: str) -> None:
    """Remember something seen while tracing, for the record of the graph being traced."""
    _notes.append(Miss(where=where, why=why, fallback=True))


def take_notes() -> tuple[Miss, ...]:
    """Hand over what was noted since the last graph, and what is missing altogether."""
    taken = (*_missing, *dict.fromkeys(_notes))
    _notes.clear()
    return taken


def missing() -> tuple[Miss, ...]:
    """Say which parts are switched off, because torch lacks a name that they lean on."""
    return tuple(_missing)


def traced_by_us() -> bool:
    """Tell whether Dynamo is tracing for our backend at this moment."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        compiler = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return False
    return _is_ours(compiler)


def _is_ours(compiler: Any) -> bool:
    """Unwrap what torch.compile puts around a backend."""
    for _ in range(8):
        if compiler is None or compiler is _backend:
            break
        inner = getattr(compiler, "_torchdynamo_orig_backend", None)
        compiler = getattr(compiler, "compiler_fn", None) if inner is None else inner
    return compiler is not None and compiler is _backend


def _hook_compile(context: Any) -> None:
    """Adopt the model of every `torch.compile(model, backend="moecc")` and check its options."""
    original = context.__call__
    inside: set[int] = set()

    @functools.wraps(original)
    def compile_and_adopt(self: Any, fn: Any) -> Any:
        if id(self) in inside:  # for a module, torch calls itself with the module's forward
            return original(self, fn)
        if _is_ours(getattr(self, "callback", None)):
            options = Options.parse(_options_of(self.callback))
            _keep_numbers(self)
            transformers_experts.install(traced_by_us, note)
            model = fn if isinstance(fn, torch.nn.Module) else getattr(fn, "__self__", None)
            if isinstance(model, torch.nn.Module):
                check_settled(model, options)
                _settle_budget(self.callback, model, options)
                adopt(model, options)
        inside.add(id(self))
        try:
            return original(self, fn)
        finally:
            inside.discard(id(self))

    context.__call__ = compile_and_adopt


def _keep_numbers(context: Any) -> None:
    """Have Dynamo take floats (`norm.eps`) as they are where `dynamic=True` makes sizes symbols.

    As symbols they differ from layer to layer, and parts of a graph cannot be compiled with them.
    """
    from torch._dynamo import config

    hooks = getattr(context, "enter_exit_hooks", None)
    patcher = getattr(config, "_make_closure_patcher", None)
    if getattr(context, "_dynamic", None) and hooks is not None and patcher is not None:
        hooks.append(patcher(specialize_float=True))


def _settle_budget(callback: Any, model: torch.nn.Module, options: Options) -> None:
    """Give the backend, which sees graphs, what was chosen with the model at hand."""
    if options.budget is not None:
        wrapper, settled = _with_options(callback), budgets.resolve(model, options)
        given = wrapper.kwargs["options"]
        wrapper.kwargs["options"] = {**given, "quantize": settled.quantize}


def _options_of(callback: Any) -> Mapping[str, Any] | None:
    wrapper = _with_options(callback)
    return wrapper.kwargs.get("options") if wrapper is not None else None


def _with_options(callback: Any) -> Any:
    while callback is not None and not hasattr(callback, "kwargs"):
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return callback

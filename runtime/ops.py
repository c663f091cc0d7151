"""Define the operators that a rewritten graph calls.

    moecc::experts        a whole MoE block's experts, run by the kernel it names
    moecc::experts.apart  the same, where each expert has matrices of its own
    moecc::expert_linear  one grouped product, y[t * K + k] = W[ids[t, k]] x (+ b)
    moecc::prefetch       start reading what a later block will likely choose, by scores [.., E]
    moecc::recall         the same by what these tokens [..] chose when they came last
    moecc::combine        the weighted sum over k, out[t] = sum_k weights[t, k] y[t * K + k]

Capture writes the last two, with the activation between them as ordinary nodes; `fuse_experts`
turns the group into the first. What it cannot turn stays and runs as defined here. Operators are
opaque to the inner backend and take weights as runtime inputs, so that one graph can serve several
layers and models.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensor

from moecc.runtime import bank
from moecc.runtime.errors import InputError
from moecc.runtime.offload.stand_in import Lender, lender_of
from moecc.runtime.parallel.exchange import exchange_named
from moecc.runtime.parallel.rows import Rows
from moecc.runtime.parallel.share import bind_share, share_of
from moecc.runtime.schemes.scheme import Schemes
from moecc.runtime.shared import add_shared
from moecc.runtime.twins import is_foreseen, twin_of
from moecc.runtime.watch import Use, watchers

ExpertsFn = Callable[
    [
        torch.Tensor,  # hidden        [T, H]
        torch.Tensor,  # ids           [T, K] int64; an id outside 0..E-1 contributes nothing
        torch.Tensor,  # weights       [T, K]
        torch.Tensor,  # gate_up       [E, 2I, H]   or [E, H, 2I] when transposed; I if not gated
        torch.Tensor,  # down          [E, H, I]    or [E, I, H] when down_transposed
        torch.Tensor | None,  # gate_up_bias  [E, 2I]
        torch.Tensor | None,  # down_bias     [E, H]
        torch.Tensor | None,  # up            [E, I, H] or [E, H, I]; gate_up is the gate alone then
        torch.Tensor | None,  # learned       [E, I]; what the activation reads besides
    ],
    torch.Tensor,  # [T, H], dtype and device of hidden
]
"""out[t] = sum_k weights[t, k] * down[e] @ act(gate_up[e] @ hidden[t]), with e = ids[t, k].

Kernels for GPUs take the keywords `shared` and `shared_scale` besides (`runtime.shared`).
"""

AddExpertsFn = Callable[..., None]
"""Add what some experts give: `add(onto, slots, *arguments of ExpertsFn)`.

onto [T, H] float32, or float64 for such weights, is added to, and `slots` [E] int64 says at which
index of the weight tensors each expert lies; one with a negative slot contributes nothing. Calls
for ascending ranges of experts, starting from zeros, give the bits of one `ExpertsFn` call when
cast to hidden's dtype.
"""

AdderFor = Callable[[Schemes | None], AddExpertsFn]
"""Give a kernel's `AddExpertsFn` for weights in schemes, or as the model has them."""

calls: Counter[str] = Counter()
"""How often each kernel ran in this process, compiled and eager roads together."""

_kernels: dict[str, tuple[Callable[..., torch.Tensor], AdderFor | None]] = {}
_library = torch.library.Library("moecc", "DEF")


def install(key: str, run: ExpertsFn, adder_for: AdderFor | None = None) -> None:
    """Make a kernel callable from graphs under its key; equal keys mean equal kernels."""
    _kernels[key] = run, adder_for


def run_experts(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    up: torch.Tensor | None,
    learned: torch.Tensor | None,
    kernel: str,
    after: Sequence[torch.Tensor] | None = None,
    shared: torch.Tensor | None = None,
    shared_scale: torch.Tensor | None = None,
    across: str = "",
) -> torch.Tensor:
    """Run a block's experts with the kernel of this key; shapes are those of `ExpertsFn`.

    `after` are predictions that have to be made before, and nothing else. What is `shared` is added
    (`runtime.shared`), by the kernel where one call computes all experts. `across` is the exchange
    with the ranks that share them (`runtime.parallel`).
    """
    matrices = (gate_up, down, gate_up_bias, down_bias, up, learned)
    share = share_of(gate_up)
    across = (share.across if share is not None else "") or across
    if not across:
        return _run_here(hidden, ids, weights, *matrices, kernel, shared, shared_scale)

    def local(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return _run_here(hidden, ids, weights, *matrices, kernel, None, None)

    exchange = exchange_named(across)
    share = exchange.share(gate_up, len(gate_up))
    return add_shared(exchange.run(local, Rows(hidden, ids, weights), share), shared, shared_scale)


def _run_here(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    up: torch.Tensor | None,
    learned: torch.Tensor | None,
    kernel: str,
    shared: torch.Tensor | None,
    shared_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Run a block's experts in this process."""
    found = _kernels.get(kernel)
    if found is None:
        raise InputError(
            f"kernel {kernel!r} is not installed in this process; "
            "graphs have to be compiled by moecc here before they run"
        )
    calls[kernel] += 1
    run, adder_for = found
    for watcher in watchers():
        use = Use(kernel=kernel, active=ids.shape[1], gate_up=gate_up, down=down, up=up)
        watcher.append(use)
    lender = twin_of(gate_up) or lender_of(gate_up)
    if lender is not None:
        if adder_for is None:
            raise InputError(f"kernel {kernel!r} reads no experts that are out of memory")
        if learned is not None:
            raise InputError(f"kernel {kernel!r} multiplies by a vector that is not on disk")
        adder = adder_for(lender.schemes)
        out = lender.run(adder, hidden, ids, weights, gate_up_bias, down_bias)
        return add_shared(out, shared, shared_scale)
    bank.refresh(gate_up)
    tensors = (hidden, ids, weights, gate_up, down, gate_up_bias, down_bias, up, learned)
    if shared is None:
        return run(*tensors)
    return run(*tensors, shared=shared, shared_scale=shared_scale)


def _experts_apart(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    up: list[torch.Tensor] | None,
    learned: torch.Tensor | None,
    kernel: str,
    after: Sequence[torch.Tensor] | None = None,
    across: str = "",
) -> torch.Tensor:
    refuse_meta(gate_up[0])
    if lender_of(gate_up[0]) is None:
        first, second = bank.together(gate_up), bank.together(down)
        third = None if up is None else bank.together(up)
    else:  # the lender has them all
        first, second, third = gate_up[0], down[0], None
    if across:  # `first` is another tensor in each call
        bind_share(first, exchange_named(across).share(gate_up[0], len(gate_up)))
    matrices = (first, second, gate_up_bias, down_bias, third, learned)
    return run_experts(hidden, ids, weights, *matrices, kernel, across=across)


def _guessing(weight: torch.Tensor) -> Lender | None:
    """Give whom predictions help: nobody while drafts do better, or where others may compute."""
    return None if is_foreseen() or share_of(weight) is not None else lender_of(weight)


def _prefetch(
    scores: torch.Tensor, weight: torch.Tensor, active: int, distance: int
) -> torch.Tensor:
    lender = _guessing(weight)
    if lender is not None:
        lender.foretell(scores.reshape(-1, scores.shape[-1]), active, distance)
    return scores.new_empty(0)


def _recall(tokens: torch.Tensor, weight: torch.Tensor, active: int) -> torch.Tensor:
    lender = _guessing(weight)
    if lender is not None:
        lender.recall(tokens.reshape(-1), active)
    return weight.new_empty(0)


def _expert_linear(
    x: torch.Tensor,
    ids: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    calls["torch: expert_linear"] += 1
    bank.refresh(weight)
    chosen, slots = ids.reshape(-1), ids.shape[1]
    out = x.new_zeros(len(chosen), weight.shape[2 if transposed else 1], dtype=weight.dtype)
    for expert in cast(list[int], ids.unique().tolist()):
        if not 0 <= expert < weight.shape[0]:
            continue
        (pairs,) = torch.where(chosen == expert)
        rows = x[pairs] if len(x) == len(chosen) else x[pairs // slots]  # one a choice, or a token
        matrix = weight[expert] if transposed else weight[expert].T
        product = rows.to(weight.dtype) @ matrix
        out[pairs] = product if bias is None else product + bias[expert]
    return out


def _combine(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    terms = y.to(wide).view(*weights.shape, y.shape[-1]) * weights.to(wide).unsqueeze(-1)
    return terms.sum(dim=1).to(y.dtype)


def refuse_meta(tensor: torch.Tensor) -> None:
    """Fail loudly where torch would return uninitialised memory: a real tensor without data."""
    if tensor.is_meta and not isinstance(tensor, FakeTensor):
        raise InputError(
            f"weights of shape {tuple(tensor.shape)} are on the meta device and hold no "
            "data; load them before calling the model"
        )


def _fake_experts(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    up: torch.Tensor | None,
    learned: torch.Tensor | None,
    kernel: str,
    after: Sequence[torch.Tensor] | None = None,
    shared: torch.Tensor | None = None,
    shared_scale: torch.Tensor | None = None,
    across: str = "",
) -> torch.Tensor:
    refuse_meta(gate_up)
    return hidden.new_empty(hidden.shape)


def _fake_experts_apart(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    up: list[torch.Tensor] | None,
    learned: torch.Tensor | None,
    kernel: str,
    after: Sequence[torch.Tensor] | None = None,
    across: str = "",
) -> torch.Tensor:
    refuse_meta(gate_up[0])
    return hidden.new_empty(hidden.shape)


def _fake_expert_linear(
    x: torch.Tensor,
    ids: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    refuse_meta(weight)
    width = weight.shape[2 if transposed else 1]
    return x.new_empty(ids.numel(), width, dtype=weight.dtype)


def _fake_prefetch(
    scores: torch.Tensor, weight: torch.Tensor, active: int, distance: int
) -> torch.Tensor:
    return scores.new_empty(0)


def _fake_recall(tokens: torch.Tensor, weight: torch.Tensor, active: int) -> torch.Tensor:
    return weight.new_empty(0)


def _fake_combine(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return y.new_empty(weights.shape[0], y.shape[1])


def _refuse_gradient(name: str) -> Callable[..., None]:
    """Stand for a backward that does not exist, so that no gradient is lost without a word."""

    def backward(ctx: object, *gradients: object) -> None:
        raise InputError(
            f"moecc::{name} has no gradient; run forward under torch.no_grad(), or set "
            "requires_grad before the model is compiled, and moecc leaves it alone"
        )

    return backward


def define(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> None:
    """Register with `Library`, not `custom_op`, which costs 100 us more a call."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moecc::{name}", fake, lib=_library)
    torch.library.register_autograd(f"moecc::{name}", _refuse_gradient(name), lib=_library)


define(
    "experts(Tensor hidden, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, Tensor? up, Tensor? learned, str kernel, "
    "Tensor[]? after=None, Tensor? shared=None, Tensor? shared_scale=None, "
    "str across='') -> Tensor",
    run_experts,
    _fake_experts,
)
define(
    "experts.apart(Tensor hidden, Tensor ids, Tensor weights, Tensor[] gate_up, Tensor[] down, "
    "Tensor? gate_up_bias, Tensor? down_bias, Tensor[]? up, Tensor? learned, str kernel, "
    "Tensor[]? after=None, str across='') -> Tensor",
    _experts_apart,
    _fake_experts_apart,
)
define(
    "expert_linear(Tensor x, Tensor ids, Tensor weight, Tensor? bias, bool transposed) -> Tensor",
    _expert_linear,
    _fake_expert_linear,
)
define("combine(Tensor y, Tensor weights) -> Tensor", _combine, _fake_combine)
define(
    "prefetch(Tensor scores, Tensor weight, int active, int distance) -> Tensor",
    _prefetch,
    _fake_prefetch,
)
define("recall(Tensor tokens, Tensor weight, int active) -> Tensor", _recall, _fake_recall)

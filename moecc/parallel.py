"""Have ranks agree before they share a model's experts, and tell its blocks with whom they do."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import nn

from moecc import __version__
from moecc.passes.options import Options
from moecc.passes.shard_experts import exchange_of
from moecc.runtime.errors import OptionError
from moecc.runtime.modules import named_modules, parameters_of
from moecc.runtime.offload.stand_in import is_stand_in
from moecc.runtime.parallel.ranks import ranks_of
from moecc.runtime.parallel.share import Share, share_of
from moecc.transformers_experts import adopted, is_experts

_OWN = {"expert_parallel", "progress"}
"""Options that may differ: ranks name their group differently, and one alone may tell."""


def agree(options: Options, model: nn.Module | None = None) -> None:
    """Have the ranks check that they are alike: versions, options but `_OWN`, the model's size.

    Raises `OptionError` naming two that are not, and for a model that is sharded already.
    """
    if options.expert_parallel is None:
        return
    names = [field.name for field in fields(Options) if field.name not in _OWN]
    facts = {f"option {name!r}": repr(getattr(options, name)) for name in names}
    facts |= {"moecc": __version__, "torch": torch.__version__}
    if model is not None:
        _refuse_sharded(model)
        numbers = sum(one.numel() for one in model.parameters())
        facts["the model"] = f"{type(model).__name__} of {numbers:,} numbers"
    ranks_of(options.expert_parallel).agree(facts)


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse what transformers' `tp_plan` or `DistributedConfig`, or DTensors, cut before."""
    cut = any(hasattr(one, "device_mesh") for one in model.parameters())
    if cut or getattr(model, "_device_mesh", None) is not None:
        raise OptionError(
            "expert_parallel is for models that are whole, and this one is sharded already, by "
            "tp_plan or a DistributedConfig; leave the option out, or load the model without them"
        )


def share_out(model: nn.Module, options: Options) -> None:
    """Have adopted experts go across ranks outside Dynamo too.

    Experts that `moecc.load` read in part stay as they were loaded.
    """
    agree(options, model)
    exchange = exchange_of(options)
    for module in model.modules():
        if module not in adopted or not is_experts(module):
            continue
        first: Any = module.gate_up_proj if module.has_gate else module.up_proj
        if is_stand_in(first):
            continue
        if exchange is not None:
            exchange.share(first, len(first)).across = exchange.key
        elif (share := share_of(first)) is not None:
            share.across = ""


def shares_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Share]]:
    """List what ranks share now, in the order of modules: path, module, share."""
    for path, module in named_modules(model):
        for parameter in parameters_of(module).values():
            share = None if parameter is None else share_of(parameter)
            if share is not None and share.across:
                yield path, module, share


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareReport:
    """One block whose experts ranks share."""

    path: str
    across: str
    held: tuple[int, ...]
    """The experts that this rank computes."""
    copies: int
    """Of all experts, beside the first of each."""
    imbalance: float
    """The busiest rank's load over the mean, by the decayed load of the tokens seen here."""
    tokens: int
    """Routed by this rank."""
    calls: dict[str, int]
    """By collective: all_to_all, gather, scatter."""
    sent_bytes: int
    """By this rank to others: tokens, their choices, and results."""
    header_bytes: int
    """To agree on how many."""


def report_shares(model: nn.Module) -> tuple[ShareReport, ...]:
    """Report on every block that ranks share."""
    return tuple(_report(path, share) for path, _, share in shares_of(model))


def _report(path: str, share: Share) -> ShareReport:
    counts = share.counts
    return ShareReport(
        path=path,
        across=share.across,
        held=tuple(share.placement.held_by(share.rank)),
        copies=sum(len(ranks) - 1 for ranks in share.placement.holders),
        imbalance=share.placement.imbalance(cast(list[float], share.load.tolist())),
        tokens=counts["tokens"],
        calls={name: counts[name] for name in ("all_to_all", "gather", "scatter") if counts[name]},
        sent_bytes=counts["sent"],
        header_bytes=counts["headers"],
    )

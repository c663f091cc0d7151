"""Read the experts that are a rank's share, and move experts by their load: `moecc.balance`."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from moecc.checkpoint.pack import Progress
from moecc.checkpoint.recipes import Recipe, make_record
from moecc.checkpoint.without_experts import Absent
from moecc.parallel import shares_of
from moecc.runtime.errors import InputError, MoeccError
from moecc.runtime.modules import parameters_of
from moecc.runtime.offload.resident import Resident
from moecc.runtime.offload.stand_in import bind, lender_of
from moecc.runtime.parallel.exchange import Exchange, exchange_named, refuse_more_ranks
from moecc.runtime.parallel.placement import Placement, balanced, contiguous
from moecc.runtime.parallel.share import Share

WORTH = 0.02
"""An imbalance that falls by less than this is noise of the measurement, and nothing moves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What balancing did to one block."""

    path: str
    before: float
    """The busiest rank's load over the mean."""
    after: float
    read: int
    """Experts that this rank read from disk."""


_recipes: "weakref.WeakKeyDictionary[nn.Module, Recipe]" = weakref.WeakKeyDictionary()
"""How the experts of a module that a rank holds in part are read."""


def read_shares(
    absent: Sequence[Absent],
    recipes: Sequence[Recipe],
    exchange: Exchange,
    progress: Progress | None,
) -> list[Resident]:
    """Read this rank's experts of every block, and no others.

    Raises `OptionError` where ranks outnumber experts.
    """
    ranks = exchange.ranks
    shares: list[list[int]] = []
    for recipe in recipes:
        refuse_more_ranks(ranks, recipe.experts, recipe.path)
        shares.append(contiguous(recipe.experts, ranks.size).held_by(ranks.rank))
    total = sum(map(len, shares))
    lenders: list[Resident] = []
    for one, recipe, mine in zip(absent, recipes, shares, strict=True):
        _recipes[one.module] = recipe
        lenders.append(_read(recipe, mine, None))
        if progress is not None:
            done = sum(len(lender.held) for lender in lenders)
            progress(done * recipe.layout.size, total * recipe.layout.size)
    return lenders


def _read(recipe: Recipe, experts: Sequence[int], old: Resident | None) -> Resident:
    """Make what lends these experts, of those that are here and of the checkpoint."""
    here = {} if old is None else {expert: slot for slot, expert in enumerate(old.held)}
    rows: list[dict[str, torch.Tensor]] = []
    for expert in experts:
        if old is not None and expert in here:
            rows.append({name: one[here[expert]] for name, one in old.tensors.items()})
        else:
            record = make_record(recipe, expert).unsqueeze(0)
            rows.append({name: one[0] for name, one in recipe.layout.tensors(record).items()})
    device = None if old is None else old.slots.device
    tensors = {
        part.name: torch.stack([row[part.name].to(device) for row in rows])
        for part in recipe.layout.parts
    }
    return Resident.of(tensors, experts, recipe.experts, recipe.schemes)


def balance(model: nn.Module, spare: int = 0) -> tuple[Moved, ...]:
    """Move experts between ranks so that the busiest has the least to do, by the measured load.

    Call it in all ranks, between two requests. Popular experts get copies where ranks have room for
    `spare` more each. Experts of a model that `moecc.load` loaded are read from its checkpoint by
    the ranks that they move to; others are everywhere, and only tokens take other ways. Returns
    what moved. Raises `InputError` for a model that no ranks share, and in all ranks, before a
    block has changed, when one of them cannot read its experts.
    """
    model = getattr(model, "_orig_mod", model)
    shares = list(shares_of(model))
    if not shares or spare < 0:
        raise InputError(
            "there is nothing to balance: compile the model with options={'expert_parallel': ...} "
            "and run it, or load it with moecc.load(..., expert_parallel=...); spare is 0 or more"
        )
    return tuple(_balance(*one, spare) for one in shares)


def _balance(path: str, module: nn.Module, share: Share, spare: int) -> Moved:
    ranks = exchange_named(share.across).ranks
    loads = ranks.gather(share.load.to(ranks.device), "loads")
    load = cast(list[float], loads.sum(dim=0).tolist())
    placement = balanced(load, ranks.size, spare)
    before, after = share.placement.imbalance(load), placement.imbalance(load)
    if after > before - WORTH:
        return Moved(path=path, before=before, after=before, read=0)
    read, lender, failure = 0, None, None
    try:
        lender, read = _moved(module, share, placement)
    except MoeccError as error:
        failure = error
    failed = torch.tensor([failure is not None], device=ranks.device)
    where = ranks.gather(failed, "experts read").nonzero()
    if len(where):
        reason = "" if failure is None else f": {failure}"
        raise InputError(
            f"rank {int(where[0, 0])} cannot read the experts of {path!r} that move to it, so "
            f"they stay where they were{reason}"
        ) from failure
    if lender is not None:
        for parameter in parameters_of(module).values():
            if parameter is not None and lender_of(parameter) is not None:
                bind(parameter, lender)
    share.move(placement)
    return Moved(path=path, before=before, after=after, read=read)


def _moved(module: nn.Module, share: Share, placement: Placement) -> tuple[Resident | None, int]:
    """Read what this rank gets; nothing where it can reach all experts anyway."""
    recipe = _recipes.get(module)
    if recipe is None:
        return None, 0
    lenders = [lender_of(one) for one in parameters_of(module).values() if one is not None]
    old = next(one for one in lenders if isinstance(one, Resident))
    mine = placement.held_by(share.rank)
    return _read(recipe, mine, old), len(set(mine) - set(old.held))

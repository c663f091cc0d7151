"""Tell what fits and how fast it would be, before any weight is read: `moecc plan`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from moecc.checkpoint.folders import CONFIGURATION, find_folder
from moecc.checkpoint.packed import is_packed, read_manifest
from moecc.checkpoint.recipes import find_recipes, layout_of_absent
from moecc.checkpoint.weights import find_weights, kept_by_configuration
from moecc.checkpoint.without_experts import Absent, take_out
from moecc.codegen.decode_cost import LEGEND, Price, Step, formulas, price
from moecc.footprint import other_bytes
from moecc.loading import active_of
from moecc.model_forms import ON_DISK, Form, form_of
from moecc.models import skeleton
from moecc.passes.options import Options
from moecc.placement import place_experts, read_for
from moecc.runtime.errors import ModelError, OptionError
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.profile import Profile
from moecc.runtime.offload.replay import replay
from moecc.runtime.schemes.scheme import Schemes


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Where the experts of one block go."""

    demand: Demand
    slots: int

    @property
    def bytes(self) -> int:
        """Of its slots."""
        return self.slots * self.demand.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What a machine makes of a plan."""

    profile: str
    tier: str
    worst: Price
    """At the hit rate of routing without any structure, or with a trace, of LRU on demand."""
    best: Price
    """With every expert there, or with a trace, at Belady's hit rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What fits."""

    model: str
    blocks: tuple[Block, ...]
    other_bytes: int
    """Of weights beside the experts, all of them in memory."""
    step: Step
    hits: tuple[float, float]
    """Bounds of the hit rate: `Rate.worst` and `Rate.best`."""
    traced: bool
    rates: tuple[Rate, ...]

    @property
    def slot_bytes(self) -> int:
        """Of experts in memory."""
        return sum(block.bytes for block in self.blocks)

    @property
    def expert_bytes(self) -> int:
        """Of all experts."""
        return sum(block.demand.bytes for block in self.blocks)

    @property
    def cost(self) -> dict[str, str]:
        """Say what the rates are made of, as formulas."""
        return formulas()


def run(
    name: str,
    memory: int | float,
    profiles: Sequence[Profile],
    quantize: str | None = None,
    trace: str | None = None,
    dtype: str = "auto",
) -> Plan:
    """Plan for a MODEL of the command line; a model type is its default configuration.

    Raises `ModelError` when it has no experts that moecc can leave elsewhere, `OptionError` when
    the budget is below one token's demand.
    """
    model, demands = _demands(name, Options.parse({"quantize": quantize}), dtype)
    slots = place_experts(demands, memory, trace)
    blocks = tuple(Block(demand=one, slots=n) for one, n in zip(demands, slots, strict=True))
    step = Step(
        blocks=len(demands),
        active_bytes=sum(one.active * one.size for one in demands),
        other_bytes=other_bytes(model),
    )
    hits = _hits(blocks) if trace is None else _hits_of_trace(blocks, trace)
    return Plan(
        model=name,
        blocks=blocks,
        other_bytes=sum(one.nbytes for one in model.parameters()),
        step=step,
        hits=hits,
        traced=trace is not None,
        rates=tuple(
            Rate(
                profile=one.name,
                tier=one.tier,
                worst=price(step, one, hits[0]),
                best=price(step, one, hits[1]),
            )
            for one in profiles
        ),
    )


def _demands(name: str, options: Options, dtype: str) -> tuple[nn.Module, list[Demand]]:
    """Make the model without weights, take its experts out, and say what they need."""
    form = form_of(name)
    model = skeleton(name, dtype)
    absent = tuple(take_out(model))
    if not absent:
        raise ModelError(
            f"{name!r} has no experts that moecc can read one by one; moecc why {name} says what "
            "it finds"
        )
    sizes: dict[str, int] = {}
    kept: Schemes | None = None
    folder = find_folder(name, CONFIGURATION) if form in ON_DISK else None
    if folder is not None and is_packed(folder):
        if options.quantize is not None:
            raise OptionError(f"{name!r} is packed already; leave --quantize out")
        sizes = {block.path: block.layout.size for block in read_manifest(folder).blocks}
    elif folder is not None and form is Form.GGUF:  # its header tells each tensor's codes
        recipes = find_recipes(model, absent, find_weights(folder), options)
        sizes = {one.path: one.layout.size for one in recipes}
    elif folder is not None and options.quantize is None:
        kept = kept_by_configuration(folder)
    active = active_of(model)

    def size(one: Absent) -> int:
        return layout_of_absent(one, kept or options.schemes(one.path))[0].size

    return model, [
        Demand(
            name=one.path,
            experts=len(one.tensors[0]),
            active=active,
            size=sizes.get(one.path) or size(one),
        )
        for one in absent
    ]


def _hits(blocks: Sequence[Block]) -> tuple[float, float]:
    """Bound the hit rate of unknown routing: experts chosen by chance, and always the same."""
    asked = sum(block.demand.active for block in blocks)
    chance = sum(block.demand.active * block.slots / block.demand.experts for block in blocks)
    return chance / asked, 1.0


def _hits_of_trace(blocks: Sequence[Block], trace: str) -> tuple[float, float]:
    """Give the hit rates of LRU and Belady with these slots."""
    recording = read_for([block.demand for block in blocks], trace)
    rates: list[float] = []
    for policy in ("lru", "belady"):
        outcomes = [
            replay(recording.of_block(number), block.slots, policy)
            for number, block in enumerate(blocks)
        ]
        asked = sum(one.asked for one in outcomes)
        rates.append(sum(one.hits for one in outcomes) / asked if asked else 1.0)
    return rates[0], rates[1]


def print_plan(plan: Plan, console: Console) -> None:
    """Print slots by block, what is in memory, and what to expect of each machine."""
    table = Table("experts of", "in memory", box=None, pad_edge=False)
    for column in ("MB each", "slots", "MB"):
        table.add_column(column, justify="right")
    for _, group in itertools.groupby(
        plan.blocks, key=lambda block: (block.slots, block.demand.size)
    ):
        same = list(group)
        demand, slots = same[0].demand, same[0].slots
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        where = "all of them" if slots >= demand.experts else "as they are asked for"
        megabytes = sum(block.bytes for block in same) / 1e6
        cells = (f"{demand.size / 1e6:.2f}", f"{slots}/{demand.experts}", f"{megabytes:,.1f}")
        table.add_row(demand.name + more, where, *cells)
    console.print(table)
    console.print(
        f"{_size(plan.slot_bytes)} of {_size(plan.expert_bytes)} of experts in memory, beside "
        f"{_size(plan.other_bytes)} of other weights, which are there whole; a token reads "
        f"{_size(plan.step.active_bytes)} of experts",
        soft_wrap=True,
        highlight=False,
    )
    what = "LRU, Belady" if plan.traced else "experts by chance, always the same"
    low, high = (f"{rate:.1%}" for rate in plan.hits)
    console.print(f"hit rate {low} to {high} ({what})\n", highlight=False)
    rates = Table("tokens/s", "tier", box=None, pad_edge=False)
    for column in (
        f"hits {low}",
        "reads hidden",
        f"hits {high}",
        "reads hidden",
        "enough hits",
    ):
        rates.add_column(column, justify="right")
    for one in plan.rates:
        cells = (one.worst.on_demand, one.worst.hidden, one.best.on_demand, one.best.hidden)
        enough = f"{one.worst.enough_hits:.1%}"
        rates.add_row(one.profile, one.tier, *(f"{cell:.2f}" for cell in cells), enough)
    console.print(rates)
    told = formulas()
    lines = [f"tokens/s  {told['on demand']}", f"hidden    {told['hidden']}"]
    lines.append(", ".join(f"{sign} {text}" for sign, text in LEGEND.items()))
    lines.append("enough hits: from there on hidden reads take less than computing")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"

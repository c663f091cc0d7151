"""Show what of the experts fits a budget, and tokens a second by how many are there when asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from moecc.codegen.decode_cost import curves, formulas
from moecc.planning import Plan
from moecc.report_html.chart import Axis, Chart, amount, legend, nice
from moecc.report_html.page import Section, details, table, tiles
from moecc.runtime.offload.profile import Profile

_RATES = tuple(step / 50 for step in range(51))


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A machine's tokens a second at each of `_RATES`."""

    profile: str
    on_demand: tuple[float, ...]
    hidden: tuple[float, ...]
    """With reads behind computing, as far as they fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan and its curves."""

    plan: Plan
    hit_rates: tuple[float, ...]
    curves: tuple[Curve, ...]


def gather(plan: Plan, profiles: Sequence[Profile]) -> Planned:
    """Evaluate the cost model of a plan over all hit rates."""
    found: list[Curve] = []
    for one in profiles:
        on_demand, hidden = curves(plan.step, one, _RATES)
        found.append(Curve(profile=one.name, on_demand=on_demand, hidden=hidden))
    return Planned(plan=plan, hit_rates=_RATES, curves=tuple(found))


def section(planned: Planned) -> Section:
    """Write what fits, the curves, and the formulas behind them."""
    plan = planned.plan
    total = sum(block.demand.bytes for block in plan.blocks)
    figures = tiles(
        [
            ("experts in memory", amount(plan.slot_bytes), ""),
            ("of all experts", amount(total), ""),
            ("other weights", amount(plan.other_bytes), ""),
            ("hit rate", f"{plan.hits[0]:.0%} – {plan.hits[1]:.0%}", ""),
        ]
    )
    what = "LRU and Belady on the trace" if plan.traced else "experts by chance and always the same"
    told = (
        f"<p>Tokens a second by the share of experts that are there when they are asked for. The "
        f"band is what this plan can expect: from {what}. Expected, not measured.</p>"
    )
    lines = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in formulas().items())
    cost = details("the cost model", f'<dl class="formulas">{lines}</dl>')
    html = f"{figures}{_slots(plan)}{told}{_draw(planned)}{cost}"
    return Section(key="plan", title="Plan", html=html)


def _slots(plan: Plan) -> str:
    rows: list[tuple[str, ...]] = []
    for _, some in groupby(plan.blocks, key=lambda one: (one.slots, one.demand.size)):
        same = list(some)
        demand, slots = same[0].demand, same[0].slots
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        cells = (f"{demand.size / 1e6:.2f}", f"{slots} of {demand.experts}")
        rows.append((f"{demand.name}{more}", *cells, f"{sum(b.bytes for b in same) / 1e6:,.1f}"))
    return table(("experts of", "MB each", "slots", "MB"), rows)


def _draw(planned: Planned) -> str:
    most = max(rate for one in planned.curves for rate in one.hidden)
    chart = Chart(
        x=Axis(low=0, high=100, label="hit rate", suffix=" %"),
        y=Axis(low=0, high=nice(most), label="tokens/s"),
        title="tokens a second by hit rate",
    )
    low, high = (100 * rate for rate in planned.plan.hits)
    chart.bar((low, 0), (max(high, low + 0.5), chart.y.high), "band")
    along = [100 * rate for rate in planned.hit_rates]
    for number, one in enumerate(planned.curves):
        chart.line(list(zip(along, one.on_demand, strict=True)), f"s{number} dash")
        chart.line(list(zip(along, one.hidden, strict=True)), f"s{number}")
    entries = [(f"key s{number}", one.profile) for number, one in enumerate(planned.curves)]
    styles = [("key solid", "reads hidden behind computing"), ("key dash", "reads on demand")]
    return chart.svg() + legend([*entries, *styles])

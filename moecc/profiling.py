"""Measure what a simulation needs to know of this machine: `moecc profile`.

How fast the model computes is seen while it generates with every expert in memory. In every second
token experts are computed one by one: a kernel call of one expert and one of K tell a launch from
an expert. Then it generates with slots for one token's experts only, so that the engine's own
readers compete with its threads as they will: that gives the link's bandwidth, and how much slower
everything computes beside reads and after them.
"""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecc.footprint import other_bytes
from moecc.generate import compiled, generate
from moecc.lenders import banks_of, bound_to
from moecc.links import new_link
from moecc.measuring import store_bandwidth
from moecc.prompted import load_prompted
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.policy import POLICIES
from moecc.runtime.offload.pool import Pool
from moecc.runtime.offload.profile import ComputeSpeed, LinkSpeed, Profile, write
from moecc.terminal import counting, live_line
from moecc.timed_bank import Call, TimedBank


def run(name: str, prompt: str, new_tokens: int, output: Path, dtype: str, quiet: bool) -> Profile:
    """Load with slots for all experts, measure, and write a profile.

    Raises what `load_prompted` does.
    """
    options: dict[str, Any] = {"expert_memory": "100%"}
    with live_line(f"loading {name}", quiet) as tell:
        loaded = load_prompted(name, prompt, new_tokens, dtype, options, tell)
        model, ids = loaded.model, loaded.ids
        with compiled(model, options):
            generate(model, ids, 4, counting(tell, 4, "compiling"))
            tell("measuring")
            made = measure(model, ids, new_tokens, f"here, with {loaded.folder.name}")
    write(made, output)
    return made


def measure(model: nn.Module, prompt: torch.Tensor, new_tokens: int, name: str) -> Profile:
    """Measure with a compiled model that `moecc.load` gave slots for all experts.

    `prompt` is [1, T] token ids.
    """
    banks = banks_of(model)
    stream = statistics.median(store_bandwidth(bank.store) for bank in banks)
    alone = _calls(model, prompt, new_tokens, banks, apart=len(banks))
    link, active = new_link(), max(call.experts for call in alone if call.tokens == 1)
    few = [_with_slots(bank, min(active, bank.store.experts), link) for bank in banks]
    lent = _calls(model, prompt, new_tokens, few)
    bandwidth = link.bandwidth or stream  # there may be nothing to read
    link.close()
    return Profile(
        name=name,
        tier="memory ← disk",
        source="measured by moecc profile",
        link=LinkSpeed(bandwidth=bandwidth, stream=min(stream, bandwidth), latency=0.0),
        compute=_compute_speed(alone, lent, banks, other_bytes(model) / len(banks)),
    )


def _with_slots(bank: Bank, slots: int, link: Link) -> Bank:
    pool = Pool(bank.store.layout, slots, POLICIES["lru"], link)
    return Bank(number=bank.number, store=bank.store, pool=pool, schemes=bank.schemes)


def _calls(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, banks: Sequence[Bank], apart: int = 0
) -> list[Call]:
    """Generate twice through these banks, on demand, and give the calls of the second time."""
    calls: list[Call] = []

    def lender(bank: Bank) -> TimedBank:
        return TimedBank(bank=banks[bank.number], calls=calls, apart=apart, foretells=False)

    with bound_to(model, lender):
        generate(model, prompt, new_tokens)
        calls.clear()
        generate(model, prompt, new_tokens)
    return calls


def _compute_speed(
    alone: Sequence[Call], lent: Sequence[Call], banks: Sequence[Bank], others: float
) -> ComputeSpeed:
    """Tell apart what calls took; `others` are bytes of weights between two blocks."""
    single = [call for call in alone if call.tokens == 1]
    whole = statistics.median(call.compute for call in single if len(call.kernels) == 1)
    one = statistics.median(
        call.compute / len(call.kernels) for call in single if len(call.kernels) > 1
    )
    active = max(call.experts for call in single)
    told_apart = active > 1 and whole > one  # noise may hide what several experts take
    expert = (whole - one) / (active - 1) if told_apart else whole / active
    bandwidth = banks[0].store.layout.size / expert
    prefill = [call for call in alone if call.tokens > 1]
    rows = statistics.median(call.tokens * active / call.experts for call in prefill)
    each = statistics.median(call.compute / call.experts for call in prefill)
    launch = max(0.0, one - expert)
    disturbed = [call for call in lent if call.tokens == 1]
    expected = sum(len(call.kernels) * launch + call.experts * expert for call in disturbed)
    layer, token = _gaps(alone)
    later_layer, later_token = _gaps(lent)
    inner = len(banks) - 1
    return ComputeSpeed(
        bandwidth=bandwidth,
        balance=rows / max(1.0, each / expert),
        launch=launch,
        call=statistics.median(call.overhead for call in single),
        layer=max(0.0, layer - others / bandwidth),
        token=max(0.0, token - layer),
        beside_reads=max(1.0, sum(call.compute for call in disturbed) / expected),
        after_reads=max(1.0, (inner * later_layer + later_token) / (inner * layer + token)),
    )


def _gaps(calls: Sequence[Call]) -> tuple[float, float]:
    """Give the seconds between two blocks of a token, and between two tokens."""
    layers: list[float] = []
    tokens: list[float] = []
    for before, after in pairwise(calls):
        if before.tokens == after.tokens == 1:
            (layers if after.block > before.block else tokens).append(after.start - before.end)
    return statistics.mean(layers or [0.0]), statistics.mean(tokens)

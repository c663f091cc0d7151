"""Whatever block the grammar makes, moecc's result is the model's own, or there is a reason."""

import os
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_flatten

import moecc
from moecc import capture
from moecc.passes.options import Options
from tests.grammar import STYLES, Sentence, build, sentence, source
from tests.grammar_styles import GRAPH_STYLES
from tests.models import relative_error

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
SIZES = (5, 1, 24, 700)
"""Token counts, the last larger than a block is ever observed with."""
OPTIONS: dict[str, Any] = {"inner": "eager", "kernels": "torch"}
"""Every kernel is tested against the torch one elsewhere; building it costs seconds."""
ROUNDS = {True: 10, False: 5}
"""Undistorted blocks of each style: of loops, and of those that need a graph, which take longer."""
SILENT = {"writes its input", "tracks loads", "goes by size"}
"""Distortions that end an observation before anything was chosen, so that nothing tells a block."""
EXAMPLES = int(os.environ.get("MOECC_PROPERTY_EXAMPLES", "2000"))


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a block on one road."""

    raised: bool
    reasons: tuple[str, ...]


def batches(told: Sentence, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Make inputs: random ones, a token of zeros, and tokens so large that scores saturate."""
    made: list[torch.Tensor] = []
    for count in sizes:
        x = torch.randn(count, 16, dtype=getattr(torch, told.dtype))
        if count == SIZES[2]:
            x[3] = 0
            x[5:9] *= 60
        made.append(x.view(2 if count % 2 == 0 else 1, -1, 16) if told.batched else x)
    return made


def same(got: Any, expected: Any, tolerance: float) -> None:
    leaves, form = tree_flatten(got)
    wanted, wanted_form = tree_flatten(expected)
    assert form == wanted_form
    for one, other in zip(leaves, wanted, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert relative_error(one, other) < tolerance


def check(told: Sentence, run: Any, model: nn.Module, sizes: tuple[int, ...]) -> None:
    """Call what moecc made of a block, and the block's twin that it never saw."""
    torch.manual_seed(told.seed + 1)
    twin = build(told)
    for x in batches(told, sizes):
        ours, theirs = x.clone(), x.clone()
        expected, got = twin(theirs), run(ours)
        same(got, expected, TOLERANCE[told.dtype])
        assert torch.equal(ours, theirs)
    for (name, one), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other), name


def outside_dynamo(told: Sentence) -> Told:
    model = build(told)
    capture.take_notes()
    capture.adopt(model, Options(**OPTIONS))
    reasons = tuple(miss.why for miss in capture.take_notes())
    check(told, model, model, SIZES)
    eager = moecc.report(model).eager
    capture.release(model)
    if eager is None:
        return Told(False, reasons)
    assert eager.calls + eager.own_calls == len(SIZES)
    assert not eager.own_calls or eager.reasons
    return Told(eager.calls == len(SIZES), (*reasons, *eager.reasons))


def through_dynamo(told: Sentence) -> Told:
    torch._dynamo.reset()
    model = build(told)
    run = torch.compile(model, backend="moecc", dynamic=True, options=OPTIONS)
    one_token = told.seed % 6 == 0  # Dynamo makes a graph of its own for one token
    check(told, run, model, SIZES if one_token else (SIZES[0], *SIZES[2:]))
    graphs = moecc.report(model).graphs
    reasons = tuple(miss["why"] for graph in graphs for miss in graph.misses)
    capture.release(model)
    return Told(any(graph.blocks for graph in graphs), reasons)


def road(told: Sentence) -> Told:
    """Take the road that a style is raised on: loops outside Dynamo, which is cheaper."""
    return outside_dynamo(told) if told.is_loop else through_dynamo(told)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("style", STYLES)
def test_nine_of_ten_undistorted_blocks_are_raised_and_right(style: str) -> None:
    choose = random.Random(style).choice
    rounds = ROUNDS[style not in GRAPH_STYLES]
    told = [road(sentence(choose, style, distorted=False)) for _ in range(rounds)]
    assert all(one.raised or one.reasons for one in told)
    left = Counter(one.reasons for one in told if not one.raised)
    assert sum(left.values()) <= rounds // 10, left


def seeded(seed: int) -> Sentence:
    """Make a block, two of three with something wrong, from one number.

    Each example differs from the others in everything, and a failure is small as it is.
    """
    choose = random.Random(seed).choice
    return sentence(choose, choose(STYLES), distorted=choose((True, True, False)))


SETTINGS = settings(
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def try_block(told: Sentence, compiled: bool) -> None:
    note(source(told))
    if told.is_loop or not compiled:
        adopted = outside_dynamo(told)
        quiet = not told.is_loop or told.distortion in SILENT
        assert adopted.raised or adopted.reasons or quiet
    if compiled:
        traced = through_dynamo(told)
        assert traced.raised or traced.reasons or told.distortion in SILENT


SEEDS = st.integers(0, 2**32 - 1).map(seeded)


@settings(SETTINGS, max_examples=200, derandomize=True)
@given(told=SEEDS)
def test_any_block_is_raised_or_left_alone_with_a_reason_and_right(told: Sentence) -> None:
    try_block(told, compiled=told.seed % (24 if told.is_loop else 4) == 3)


@pytest.mark.slow
@settings(SETTINGS, max_examples=EXAMPLES)
@given(told=SEEDS)
def test_thousands_of_blocks_are_right(told: Sentence) -> None:
    try_block(told, compiled=True)

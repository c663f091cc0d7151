from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from moecc.passes import shard_experts as module
from moecc.passes.ir import Program
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, Step, run
from moecc.passes.text import graph_diff
from moecc.runtime.errors import OptionError
from moecc.runtime.parallel.exchange import Exchange
from tests.models import BatchedMoe, Dense, capture, tokens

SHARED = Options(expert_parallel=2)


@pytest.fixture(autouse=True)
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name two ranks that nobody calls; tests/parallel runs real ones."""
    group = SimpleNamespace(group_name="0")
    ranks: Any = SimpleNamespace(size=2, rank=0, group=group, agree=lambda facts: None)
    exchange = Exchange(ranks=ranks, tokens="split", few=lambda shape: 0.0)
    found = {None: None, 2: exchange}
    monkeypatch.setattr(module, "exchange_of", lambda options: found[options.expert_parallel])


def step_of(result: Result) -> Step:
    return next(step for step in result.steps if step.name == "shard_experts")


def program_of(model: torch.nn.Module) -> Program:
    return Program(gm=capture(model, tokens(6, torch.float32)).gm)


def test_says_which_ranks_work_on_a_block(golden: Callable[[str], None]) -> None:
    step = step_of(run(program_of(BatchedMoe(torch.float32)), SHARED, keep_text=True))
    golden(graph_diff(step.before, step.after, "shard_experts") + "\n")


def test_later_passes_keep_it_and_running_twice_is_running_once() -> None:
    once = run(program_of(BatchedMoe(torch.float32)), SHARED, keep_text=True)
    (call,) = [node for node in once.program.gm.graph.nodes if node.name == "experts"]
    assert call.kwargs == {"across": "split over 2 ranks of 0"}
    assert cast(str, call.args[-1]).startswith("native:")
    assert step_of(run(once.program, SHARED)).rewrites == 0


def test_changes_nothing_without_the_option_or_without_blocks() -> None:
    for model, options in ((BatchedMoe(torch.float32), Options()), (Dense(), SHARED)):
        assert step_of(run(program_of(model), options)).rewrites == 0


def test_refuses_more_ranks_than_experts() -> None:
    model = BatchedMoe(torch.float32, experts=1, active=1)
    with pytest.raises(OptionError, match="1 experts, fewer than the 2 ranks"):
        run(program_of(model), SHARED)

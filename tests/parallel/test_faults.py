"""Ranks that are unlike, lose each other, hang or die: an error everywhere that names who."""

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import init_device_mesh

import moecc
from moecc import backend, parallel
from moecc.passes.options import Options
from moecc.runtime.errors import InputError, OptionError, ParallelError, StoreError
from moecc.runtime.parallel.exchange import Exchange, Tokens
from moecc.runtime.parallel.placement import contiguous
from moecc.runtime.parallel.ranks import Ranks, ranks_of
from moecc.runtime.parallel.rows import Rows
from moecc.runtime.parallel.share import Share, bind_share
from tests.models import BatchedMoe, tokens
from tests.parallel.ranks import on_ranks

SLOW = 1.5
"""Seconds that a group of these tests waits."""


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    assert backend.moecc
    return torch.compile(model, backend="moecc", options={"inner": "eager", **options})


def refusal(model: torch.nn.Module, **options: Any) -> str:
    """Say what compiling and calling a model raises."""
    torch._dynamo.reset()
    with pytest.raises((OptionError, BackendCompilerFailed)) as raised:
        compiled(model, expert_parallel=2, **options)(tokens(5, torch.float32))
    return str(raised.value)


def call(
    ranks: Ranks, count: int, expert: int = 0, fault: str = "", own: Tokens = "replicated"
) -> None:
    def local(hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        if fault:
            raise StoreError(fault)
        return hidden

    share = Share(placement=contiguous(4, ranks.size), rank=ranks.rank, across="")
    exchange = Exchange(ranks=ranks, tokens=own, few=lambda shape: 1e9)
    ids = torch.full((count, 2), expert)
    rows = Rows(torch.zeros(count, 8), ids, ids.float())
    exchange.run(local, rows, share)


def check_unlike_ranks(rank: int) -> None:
    model = BatchedMoe(torch.float32)
    said = refusal(model, kernels=("torch", "native")[rank])
    assert "option 'kernels' is 'torch' in rank 0 and 'native' in rank 1" in said
    parallel.agree(Options(expert_parallel=2, progress=rank == 0))  # one of them tells
    said = refusal(BatchedMoe(torch.float32, experts=4 + 2 * rank))
    assert "BatchedMoe of 1,600 numbers in rank 0" in said
    assert "numbers in rank 1" in said
    parallel.__version__ = f"0.{rank}"
    with pytest.raises(OptionError, match=r"moecc is 0\.0 in rank 0 and 0\.1 in rank 1"):
        parallel.agree(Options(expert_parallel=2))
    parallel.__version__ = moecc.__version__
    said = refusal(BatchedMoe(torch.float32, experts=1, active=1))
    assert "has 1 experts, fewer than the 2 ranks" in said


def check_ways_to_name_ranks(rank: int) -> None:
    flat, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    assert (ranks_of(flat).size, ranks_of(flat).rank) == (2, rank)
    assert ranks_of(1).size == 1
    with pytest.raises(OptionError, match="a mesh of 2 dimensions"):
        ranks_of(square)
    with pytest.raises(OptionError, match="does not divide the 2 ranks"):
        ranks_of(3)


def check_lost_ranks(rank: int) -> None:
    check_ways_to_name_ranks(rank)
    ranks = ranks_of(2)
    with pytest.raises(InputError, match="run the same tokens; say"):
        call(ranks, 3, expert=rank)
    with pytest.raises(InputError, match="routes 2000 tokens otherwise"):
        call(ranks, (3, 2000)[rank])
    if rank == 0:
        ranks.step += 1
    with pytest.raises(ParallelError, match=r"and rank . at exchange"):
        call(ranks, 3)


def test_unlike_ranks_are_refused_and_lost_ones_are_noticed() -> None:
    on_ranks(2, check_unlike_ranks)
    on_ranks(2, check_lost_ranks)


def check_a_rank_that_cannot_compute(rank: int) -> None:
    ranks, why = ranks_of(3), "the disk of rank 1 is gone"
    error, said = (StoreError, why) if rank == 1 else (ParallelError, "rank 1 could not compute")
    with pytest.raises(error, match=said):
        call(ranks, 2, fault=why if rank == 1 else "")
    call(ranks, 2)  # all are where they were
    ranks = ranks_of(dist.new_group(timeout=timedelta(seconds=SLOW)))
    with pytest.raises(StoreError if rank == 1 else ParallelError, match=why):
        call(ranks, 2, fault=why if rank == 1 else "", own="split")
    with pytest.raises(ParallelError, match=f"{why}.*cannot go on"):
        call(ranks, 2)


def check_a_rank_that_hangs_and_one_that_dies(rank: int) -> str:
    slow = dist.new_group(timeout=timedelta(seconds=SLOW))
    call(ranks_of(slow), 2)
    if rank == 1:
        time.sleep(2 * SLOW)
    else:
        start = time.monotonic()
        with pytest.raises(ParallelError, match=r"exchange 2 .*: rank 1 did not answer"):
            call(ranks_of(slow), 2)
        assert time.monotonic() - start < SLOW + 4
        with pytest.raises(ParallelError, match="cannot go on"):
            call(ranks_of(slow), 2)
    check_a_rank_that_cannot_compute(rank)
    whole = ranks_of(3)
    call(whole, 2)
    if rank == 2:
        os._exit(1)
    with pytest.raises(ParallelError, match="rank 2 did not answer") as raised:
        call(whole, 2)
    return str(raised.value)


def test_every_other_rank_says_who_hangs_and_who_died() -> None:
    on_ranks(3, check_a_rank_that_hangs_and_one_that_dies, ends=2)


def test_an_option_without_other_ranks_says_what_to_start() -> None:
    with pytest.raises(OptionError, match="torchrun"):
        parallel.agree(Options(expert_parallel=2))
    with pytest.raises(OptionError, match="a number of ranks"):
        Options.parse({"expert_parallel": "all"})
    with pytest.raises(OptionError, match="replicated"):
        Options.parse({"tokens": "shared"})


def test_what_is_over_is_not_there_to_balance() -> None:
    model = BatchedMoe(torch.float32)
    weight = next(model.parameters())
    bind_share(weight, Share(placement=contiguous(4, 2), rank=0, across="replicated"))
    assert len([*parallel.shares_of(model)]) == 1
    bind_share(weight, Share(placement=contiguous(4, 2), rank=0, across=""))
    with pytest.raises(InputError, match="nothing to balance"):
        moecc.balance(model)

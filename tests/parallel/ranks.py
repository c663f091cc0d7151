"""Run a check in several processes that are the ranks of a gloo group."""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor import config as inductor

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["transformers.integrations.moe", "moecc.backend", "moecc.tiny"])
PATIENCE = 150.0
"""Seconds until a check counts as hanging."""


def on_ranks(
    size: int,
    check: Callable[..., Any],
    *arguments: Any,
    timeout: float = 30,
    ends: int | None = None,
) -> list[Any]:
    """Give what `check(rank, *arguments)` returns in each rank; its failure is one here.

    `timeout` is the group's, in seconds. A rank that `ends` is expected to give nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = _FORKS.SimpleQueue()
        ranks = [
            _FORKS.Process(
                target=_work,
                args=(answers, rank, size, folder, timeout, check, arguments),
                daemon=True,
            )
            for rank in range(size)
        ]
        for one in ranks:
            one.start()
        end = time.monotonic() + PATIENCE
        for one in ranks:
            one.join(max(0.1, end - time.monotonic()))
        hanging = [rank for rank, one in enumerate(ranks) if one.is_alive()]
        for one in ranks:
            one.kill()
        found: dict[int, tuple[Any, str]] = {}
        while not answers.empty():
            rank, answer, failure = answers.get()
            found[rank] = answer, failure
    assert not hanging, f"ranks {hanging} hang; of others: {found}"
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in found.items() if failure]
    assert not failures, "\n".join(failures)
    assert set(found) == set(range(size)) - {ends}
    return [found[rank][0] for rank in range(size) if rank != ends]


def _work(
    answers: Any, rank: int, size: int, folder: str, timeout: float, check: Any, arguments: Any
) -> None:
    torch.set_num_threads(1)
    inductor.compile_threads = 1  # its pool of workers costs more than what they would compile
    wait = timedelta(seconds=timeout)
    method = f"file://{Path(folder) / 'ranks'}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=wait)
    try:
        with torch.no_grad():
            answer = check(rank, *arguments)
        answers.put((rank, answer, ""))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        return
    with suppress(RuntimeError):  # a check may have broken the group
        dist.barrier()  # nobody leaves while others still talk

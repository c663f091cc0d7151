"""Talk to the other ranks of a torch.distributed group, and say who it was that did not answer.

Collectives are torch's functional ones, on whatever the group runs on (gloo, NCCL). How long a rank
waits is the group's timeout. After a failure every rank leaves its mark in the group's store and
drops its connections, which wakes the others: who leaves no mark is who was waited for, unless a
mark says why.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist

from moecc.runtime.errors import OptionError, ParallelError

_GRACE = 3.0
"""Seconds that others have to leave their mark; their connections are gone by then."""


@dataclass(slots=True, kw_only=True, eq=False)
class Ranks:
    """The ranks that share experts, seen from one of them."""

    group: dist.ProcessGroup
    rank: int
    size: int
    step: int = 0
    """Exchanges so far: in all ranks alike, or they have lost each other."""
    _failed: str = ""
    _agreed: set[str] = field(default_factory=set[str])

    @property
    def device(self) -> str:
        """Where tensors of nobody in particular have to be, to be sent."""
        return "cuda" if "nccl" in dist.get_backend(self.group) else "cpu"

    def gather(self, rows: torch.Tensor, what: str) -> torch.Tensor:
        """Give everybody's tensor of the same shape [..] as [ranks, ..]."""
        call = torch.ops._c10d_functional.all_gather_into_tensor
        flat = rows.contiguous().view(1, -1)
        found = self._wait(what, lambda: call(flat, self.size, self.group.group_name))
        return found.view(self.size, *rows.shape)

    def exchange(
        self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], what: str
    ) -> torch.Tensor:
        """Send `send[r]` of the rows [n, width] to rank r; give `receive[r]` from each, by rank."""
        call = torch.ops._c10d_functional.all_to_all_single
        name = self.group.group_name
        return self._wait(what, lambda: call(rows.contiguous(), list(receive), list(send), name))

    def alone(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute what others wait for in the middle of an exchange: none can follow a failure.

        Others are told why, but gloo wakes them no sooner than their time is up.
        """
        try:
            return call()
        except Exception as error:
            self._failed = f"rank {self.rank} stopped at exchange {self.step}: {error}"
            with suppress(RuntimeError):  # the first error is the one to see
                self._leave(self._failed)
            raise

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise `OptionError` in every rank where one of the facts is not everybody's.

        Ranks ask once for the same facts, in the same order.
        """
        mine = json.dumps(facts, sort_keys=True)
        if mine in self._agreed:
            return
        found: list[Any] = [None] * self.size
        self._guard("agreeing on " + ", ".join(facts), lambda: self._gather_texts(found, mine))
        first, *others = [cast(dict[str, str], json.loads(one)) for one in found]
        for rank, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys()):
                if first.get(name) != other.get(name):
                    raise OptionError(
                        f"ranks that share experts have to be alike: {name} is {first.get(name)} "
                        f"in rank 0 and {other.get(name)} in rank {rank}"
                    )
        self._agreed.add(mine)

    def _gather_texts(self, found: list[Any], mine: str) -> torch.Tensor:
        dist.all_gather_object(found, mine, group=self.group)
        return torch.empty(0)

    def _wait(self, what: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self._guard(what, lambda: torch.ops._c10d_functional.wait_tensor(call()))

    def _guard(self, what: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._failed:
            raise ParallelError(f"{self._failed}; this group cannot go on, start all ranks again")
        try:
            return call()
        except RuntimeError as error:  # torch has no narrower class for what gloo and NCCL raise
            self._failed = f"rank {self.rank} stopped at exchange {self.step} ({what}): "
            self._failed += self._blame()
            raise ParallelError(
                f"{self._failed}. Start all ranks again; how long they wait is the timeout of "
                f"torch.distributed.init_process_group. The group said: {error}"
            ) from error

    def _blame(self) -> str:
        """Say which ranks left no mark, after waking those that wait for this one."""
        try:
            store = self._leave("")
            silent, end = list(range(self.size)), time.monotonic() + _GRACE
            while silent and time.monotonic() < end:
                silent = [rank for rank in silent if not store.check([self._mark(rank)])]
                time.sleep(0.01)
            marks = (store.get(self._mark(rank)) for rank in range(self.size) if rank not in silent)
            if reason := b"; ".join(filter(None, marks)):
                return reason.decode()
        except RuntimeError:
            return "the process that keeps the group's store (rank 0, or torchrun) is gone"
        if not silent:
            return "every rank is alive and stopped; the first of their errors says why"
        names = " and ".join(f"rank {rank}" for rank in silent)
        return f"{names} did not answer: it died, hangs, or is slower than the timeout"

    def _leave(self, reason: str) -> Any:
        """Mark this rank as stopped, wake those that wait for it, and give the store of marks."""
        store: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        store.set(self._mark(self.rank), reason)
        cast(Any, self.group).abort()
        return store

    def _mark(self, rank: int) -> str:
        return f"moecc/{self.group.group_name}/{rank}"


def ranks_of(wanted: Any) -> Ranks:
    """Find the ranks that a size, a one-dimensional DeviceMesh or a ProcessGroup means.

    A size that divides the world makes groups of neighbours, which all ranks have to ask for.
    Raises `OptionError` where there is no such group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise OptionError(
            f"expert_parallel={wanted!r} needs the other ranks: start the program with torchrun "
            "and call torch.distributed.init_process_group() before"
        )
    return _ranks(wanted, dist.group.WORLD)


@cache
def _ranks(wanted: Any, world: dist.ProcessGroup) -> Ranks:
    """Make each group once; a world that was destroyed and made again has others."""
    group = _group_of(wanted, world)
    rank = dist.get_rank(group)
    if rank < 0:
        raise OptionError(f"expert_parallel={wanted!r} has not this process among its ranks")
    return Ranks(group=group, rank=rank, size=dist.get_world_size(group))


def _group_of(wanted: Any, world: dist.ProcessGroup) -> dist.ProcessGroup:
    if isinstance(wanted, dist.ProcessGroup):
        return wanted
    if isinstance(wanted, int):
        if world.size() % wanted:
            raise OptionError(
                f"expert_parallel={wanted} does not divide the {world.size()} ranks of this run"
            )
        return world if wanted == world.size() else cast(Any, dist.new_subgroups(wanted)[0])
    if wanted.ndim != 1:
        names = wanted.mesh_dim_names or "its dimensions"
        raise OptionError(
            f"expert_parallel is a mesh of {wanted.ndim} dimensions; give one: {names}"
        )
    return wanted.get_group()

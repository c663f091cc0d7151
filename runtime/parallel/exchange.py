"""Bring tokens to the ranks that hold their experts, and the results back.

    split       every rank has tokens of its own (data-parallel attention)
        all_to_all  a token goes once to each rank that computes for it, and one row comes back
        gather      every token goes to every rank: fewer messages, for few tokens
    replicated  all ranks have the same tokens; each computes what it holds
        gather      every rank gets all parts and adds them up
        scatter     every rank adds up a slice of the tokens, and passes its sums on

Parts have the dtype of `hidden`, and are added in the order of ranks, wide, whichever way they
came: the collective changes no bit, nor does timing. A header before them tells ranks how many rows
to expect, and that all are at the same block of the same step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch

from moecc.runtime.bank import anchor
from moecc.runtime.errors import InputError, OptionError, ParallelError
from moecc.runtime.parallel.placement import contiguous
from moecc.runtime.parallel.ranks import Ranks
from moecc.runtime.parallel.rows import Rows
from moecc.runtime.parallel.share import Share, bind_share, share_of

Tokens = Literal["replicated", "split"]
INLINE = 1 << 13
"""Bytes of results that go with a header: they take less than another message's latency."""
_FAILED = -1
"""Where a rank is that raises an error instead of computing its part."""
Local = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The block's kernel on hidden [T, H], ids [T, K] and weights [T, K]; other ids give nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides which collective is sooner."""

    tokens: Tokens
    ranks: int
    active: int
    """K."""
    out: int
    """Bytes of a token with its choices."""
    back: int
    """Bytes of a result."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exchange:
    """How the ranks of a group work on a block together."""

    ranks: Ranks
    tokens: Tokens
    few: Callable[[Shape], float]
    """Up to how many tokens a rank `gather` is sooner."""

    @property
    def key(self) -> str:
        """Name the exchange in graphs."""
        return f"{self.tokens} over {self.ranks.size} ranks of {self.ranks.group.group_name}"

    def share(self, weight: torch.Tensor, experts: int) -> Share:
        """Give what is known of the block of a first weight, [E, ..] or its first expert's.

        A weight that a graph computes is another tensor in each call: its experts never move.
        """
        share = share_of(weight)
        if share is None or share.placement.ranks != self.ranks.size:
            refuse_more_ranks(self.ranks, experts, "a block")
            even = contiguous(experts, self.ranks.size)
            share = Share(placement=even, rank=self.ranks.rank, across=self.key)
            bind_share(weight, share)
            bind_share(anchor(weight), share)
        return share

    def run(self, local: Local, rows: Rows, share: Share) -> torch.Tensor:
        """Compute a block for the tokens of this rank, [T, H].

        Raises `ParallelError` when a rank does not answer, fails, or is somewhere else,
        `InputError` when ranks that should have the same tokens do not.
        """
        self.ranks.step += 1
        share.learn(rows.ids)
        shape = Shape(
            tokens=self.tokens,
            ranks=self.ranks.size,
            active=rows.ids.shape[1],
            out=rows.size,
            back=rows.hidden.shape[1] * rows.hidden.itemsize,
        )
        if self.tokens == "replicated":
            return self._replicated(local, rows, share, self.few(shape))

        def part(*rows: torch.Tensor) -> torch.Tensor:
            return self.ranks.alone(lambda: local(*rows))

        return self._split(part, rows, share, self.few(shape))

    def _replicated(self, local: Local, rows: Rows, share: Share, few: float) -> torch.Tensor:
        """Compute what this rank holds for all tokens, and add up what all ranks did."""
        hidden, ids, weights = rows
        order = torch.arange(1, ids.numel() + 1, device=ids.device)
        header = self._header(rows, share, int(((ids.reshape(-1) + 1) * order).sum()))
        mine = ids.where(share.ranks_for(ids) == self.ranks.rank, -1)
        try:
            part = local(hidden, mine, weights) if len(hidden) else hidden
        except Exception:
            header[0] = _FAILED
            self._send_first(header, header[:0])
            raise
        parts = self._first(part, header, share)
        if part.nbytes <= INLINE or len(hidden) <= few:
            share.counts["gather"] += int(len(hidden) > 0)
            return _sum(list(parts if part.nbytes <= INLINE else self._gather(part, share)))
        share.counts["scatter"] += 1
        each = -(-len(part) // self.ranks.size)
        missing = part.new_zeros(each * self.ranks.size - len(part), part.shape[1])
        own = _sum(self._back(torch.cat([part, missing]), share))
        return self._gather(own, share).flatten(0, 1)[: len(part)]

    def _first(self, part: torch.Tensor, header: torch.Tensor, share: Share) -> torch.Tensor:
        """Send headers, and parts that fit beside them, which come back as [ranks, T, H]."""
        fits = part.numel() if part.nbytes <= INLINE else 0
        found = self._send_first(header, part.reshape(-1)[:fits])
        inside = fits * part.itemsize
        share.counts["sent"] += (self.ranks.size - 1) * inside
        share.counts["headers"] += (self.ranks.size - 1) * (found[0].nbytes - inside)
        self._check(header, found[:, : header.numel()])
        parts = found[:, header.numel() :].contiguous().view(part.dtype)[:, :fits]
        return parts.view(self.ranks.size, -1, part.shape[1])

    def _send_first(self, header: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Send a header and values, and give everybody's.

        The message has one length, whatever the tokens: gloo ends a process that gets another one.
        """
        sent = header.new_zeros(header.numel() + INLINE // header.itemsize)
        sent[: header.numel()] = header
        sent[header.numel() :].view(values.dtype)[: len(values)] = values
        return self.ranks.gather(sent, "headers")

    def _split(self, local: Local, rows: Rows, share: Share, few: float) -> torch.Tensor:
        """Send each token to the ranks that hold its experts, and add up what comes back."""
        hidden, ids, _ = rows
        owners = share.ranks_for(ids, self.ranks.rank)
        wanted = torch.stack([(owners == rank).any(dim=1) for rank in range(self.ranks.size)])
        ranks, tokens = wanted.nonzero(as_tuple=True)
        send = cast(list[int], wanted.sum(dim=1).tolist())
        own = self._header(rows, share, 0, send)
        headers = self._check(own, self.ranks.gather(own, "headers"))
        share.counts["headers"] += (self.ranks.size - 1) * own.nbytes
        most = max(header[0] for header in headers)
        if not most:
            return torch.empty_like(hidden)
        if most <= few:
            return self._everywhere(local, rows, share, most)
        share.counts["all_to_all"] += 1
        receive = [header[2 + self.ranks.rank] for header in headers]
        out = rows.of(tokens)
        theirs = out.ids.where(owners[tokens] == ranks.unsqueeze(1), -1)
        arrived = rows.unpack(self._swap(out._replace(ids=theirs).pack(), send, receive, share))
        results = local(*arrived) if sum(receive) else hidden.new_empty(0, hidden.shape[1])
        parts = torch.split(self._swap(results, receive, send, share), send)
        total = hidden.new_zeros(hidden.shape, dtype=_wide(hidden.dtype))
        for there, part in zip(torch.split(tokens, send), parts, strict=True):
            total.index_add_(0, there, part.to(total.dtype))
        return total.to(hidden.dtype)

    def _everywhere(self, local: Local, rows: Rows, share: Share, most: int) -> torch.Tensor:
        """Send all tokens to all ranks, padded to as many as the fullest rank has."""
        share.counts["gather"] += 1
        everyone = rows.unpack(self._gather(rows.up_to(most).pack(), share).flatten(0, 1))
        owners = [
            share.ranks_for(ids, rank) for rank, ids in enumerate(torch.split(everyone.ids, most))
        ]
        mine = everyone.ids.where(torch.cat(owners) == self.ranks.rank, -1)
        part = local(everyone.hidden, mine, everyone.weights)
        return _sum(self._back(part, share))[: len(rows.hidden)]

    def _header(
        self, rows: Rows, share: Share, routing: int, send: Sequence[int] = ()
    ) -> torch.Tensor:
        """Say where this rank is, its tokens, their routing, and rows for each rank: int64."""
        tokens, width = rows.hidden.shape
        place = (self.ranks.step, len(share.load), width, rows.ids.shape[1])
        return torch.tensor([*place, tokens, routing, *send], device=rows.hidden.device)

    def _check(self, own: torch.Tensor, everyone: torch.Tensor) -> list[list[int]]:
        """Give everybody's tokens, routing and rows for each rank; all must be at one place."""
        place = cast(list[int], own[:4].tolist())
        found = cast(list[list[int]], everyone.tolist())
        for rank, other in enumerate(found):
            if other[0] == _FAILED:
                raise ParallelError(
                    f"rank {rank} could not compute its part of exchange {place[0]}; the error "
                    "there says why"
                )
            if other[:4] != place:
                raise ParallelError(
                    f"rank {self.ranks.rank} is at exchange {place[0]}, experts, hidden size and "
                    f"active {place[1:]}, and rank {rank} at exchange {other[0]}, {other[1:4]}; "
                    "run the same model the same number of times in all ranks"
                )
            if self.tokens == "replicated" and other[4:] != found[0][4:]:
                raise InputError(
                    f"rank {rank} routes {other[4]} tokens otherwise than rank 0 its "
                    f"{found[0][4]}: with tokens='replicated' all ranks run the same tokens; say "
                    "options={'tokens': 'split'} where each has its own"
                )
        return [other[4:] for other in found]

    def _swap(
        self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], share: Share
    ) -> torch.Tensor:
        abroad = len(rows) - send[self.ranks.rank]
        share.counts["sent"] += abroad * rows.shape[1] * rows.itemsize
        return self.ranks.exchange(rows, send, receive, "tokens and results")

    def _back(self, parts: torch.Tensor, share: Share) -> Sequence[torch.Tensor]:
        """Give each rank its slice of everybody's parts, equal slices in the order of ranks."""
        even = [len(parts) // self.ranks.size] * self.ranks.size
        return torch.split(self._swap(parts, even, even, share), even)

    def _gather(self, rows: torch.Tensor, share: Share) -> torch.Tensor:
        share.counts["sent"] += (self.ranks.size - 1) * rows.nbytes
        return self.ranks.gather(rows, "tokens or results")


def refuse_more_ranks(ranks: Ranks, experts: int, path: str) -> None:
    """Raise `OptionError` where some rank would have nothing to do."""
    if experts < ranks.size:
        raise OptionError(
            f"{path} has {experts} experts, fewer than the {ranks.size} ranks to share them, and "
            f"moecc does not slice an expert; ask for expert_parallel={experts} at most"
        )


_exchanges: dict[str, Exchange] = {}


def install_exchange(exchange: Exchange) -> None:
    """Make an exchange callable from graphs under its key."""
    _exchanges[exchange.key] = exchange


def exchange_named(key: str) -> Exchange:
    """Find an exchange. Raises `InputError` where this process has none of that name."""
    found = _exchanges.get(key)
    if found is None:
        raise InputError(
            f"ranks are not known in this process as {key!r}; graphs have to be compiled by moecc "
            "here before they run"
        )
    return found


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add up equal shapes in order, wide."""
    total = torch.zeros_like(parts[0], dtype=_wide(parts[0].dtype))
    for part in parts:
        total += part
    return total.to(parts[0].dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

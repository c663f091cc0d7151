"""Tokens find their experts on other ranks, and come back as if they had not left."""

import math

import torch

from moecc.runtime.parallel.exchange import Exchange, Tokens
from moecc.runtime.parallel.placement import Placement, balanced, contiguous
from moecc.runtime.parallel.ranks import Ranks, ranks_of
from moecc.runtime.parallel.rows import Rows
from moecc.runtime.parallel.share import Share
from tests.parallel.ranks import on_ranks

RANKS, HIDDEN, INNER, ACTIVE = 4, 6, 5, 2


class Block:
    """Experts whose result for a token has the same bits in every batch."""

    def __init__(self, experts: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(experts)
        sizes = ((experts, INNER, HIDDEN), (experts, HIDDEN, INNER))
        self.first, self.second = (torch.randn(s, generator=generator).to(dtype) for s in sizes)

    def __call__(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros(hidden.shape)
        for chosen, weight in zip(ids.T, weights.T, strict=True):
            known = ((chosen >= 0) & (chosen < len(self.first))).float() * weight
            expert = chosen.clamp(0, len(self.first) - 1)
            inner = (self.first[expert].float() * hidden.float()[:, None]).sum(-1).relu()
            out += (self.second[expert].float() * inner[:, None]).sum(-1) * known[:, None]
        return out.to(hidden.dtype)


def tokens_of(seed: int, count: int, experts: int, dtype: torch.dtype) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, experts, generator=generator) ** 4 * torch.arange(experts, 0, -1)
    weights, ids = scores.topk(ACTIVE)
    return Rows(torch.randn(count, HIDDEN, generator=generator).to(dtype), ids, weights)


def exchange_by(ranks: Ranks, tokens: Tokens, few: float) -> Exchange:
    return Exchange(ranks=ranks, tokens=tokens, few=lambda shape: few)


def least_bytes(inputs: Rows, placement: Placement, here: int) -> tuple[int, list[int]]:
    """Count, choice by choice, what has to leave this rank, and the rows for each rank."""
    hidden, ids, weights = inputs
    needed = set[tuple[int, int]]()
    for token, row in enumerate(ids.tolist()):
        for expert in row:
            holders = placement.holders[expert]
            needed.add((token, holders[(token + here) % len(holders)]))
    rows = [sum(rank == to for _, to in needed) for rank in range(placement.ranks)]
    row = HIDDEN * hidden.itemsize + ACTIVE * (4 + weights.itemsize)
    return (sum(rows) - rows[here]) * row, rows


def check_tokens_that_are_split(rank: int) -> None:
    ranks = ranks_of(RANKS)
    for experts, dtype in ((8, torch.float32), (7, torch.float32), (8, torch.bfloat16)):
        block = Block(experts, dtype)
        copies = balanced([2**expert for expert in range(experts)][::-1], RANKS, spare=1)
        for placement in (contiguous(experts, RANKS), copies):
            for counts in ((5, 0, 3, 9), (1, 1, 1, 1), (0, 0, 0, 2), (0, 0, 0, 0)):
                everyone = [tokens_of(r, count, experts, dtype) for r, count in enumerate(counts)]
                shares = [Share(placement=placement, rank=rank, across="") for _ in range(2)]
                got = [
                    exchange_by(ranks, "split", few).run(block, everyone[rank], share)
                    for few, share in zip((0, math.inf), shares, strict=True)
                ]
                assert torch.equal(*got), "the collective changes bits"
                bound = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
                torch.testing.assert_close(got[0], block(*everyone[rank]), atol=bound, rtol=bound)
                sent = [least_bytes(one, placement, r) for r, one in enumerate(everyone)]
                arrived = sum(rows[rank] for r, (_, rows) in enumerate(sent) if r != rank)
                least = sent[rank][0] + arrived * HIDDEN * dtype.itemsize
                assert shares[0].counts["sent"] == least
                calls = int(any(counts))
                assert [share.counts["all_to_all"] for share in shares] == [calls, 0]
                assert shares[1].counts["gather"] == calls


def check_tokens_that_all_have(rank: int) -> None:
    ranks, block = ranks_of(RANKS), Block(7, torch.float32)
    copies = balanced([2**expert for expert in range(7)][::-1], RANKS, spare=1)
    for placement in (contiguous(7, RANKS), copies):
        for count in (0, 1, 6, 401):
            inputs = tokens_of(3, count, 7, torch.float32)
            got: list[torch.Tensor] = []
            for few, way in ((0, "scatter" if count > 400 else "gather"), (math.inf, "gather")):
                share = Share(placement=placement, rank=rank, across="")
                got.append(exchange_by(ranks, "replicated", few).run(block, inputs, share))
                assert share.counts[way] == int(count > 0)
                part, each = inputs.hidden.nbytes, -(-count // RANKS) * HIDDEN * 4
                least = (RANKS - 1) * (part if way == "gather" else 2 * each)
                assert share.counts["sent"] == least
                assert share.load.sum() == count * ACTIVE
            assert torch.equal(*got), "the collective changes bits"
            torch.testing.assert_close(got[0], block(*inputs), atol=1e-6, rtol=1e-6)


def check_everything_to_one_expert_and_ids_that_are_none(rank: int) -> None:
    ranks, block = ranks_of(RANKS), Block(8, torch.float32)
    hidden, _, weights = tokens_of(rank, 5, 8, torch.float32)
    for ids in (
        torch.full((5, ACTIVE), 6),
        torch.tensor([[-1, 8]] * 5),
        torch.tensor([[3, 99]] * 5),
    ):
        share = Share(placement=contiguous(8, RANKS), rank=rank, across="")
        got = exchange_by(ranks, "split", 0).run(block, Rows(hidden, ids, weights), share)
        torch.testing.assert_close(got, block(hidden, ids, weights), atol=1e-6, rtol=1e-6)


def check_pairs(rank: int) -> None:
    pair = ranks_of(2)
    assert (pair.size, pair.rank) == (2, rank % 2)
    together = pair.gather(torch.tensor([rank]), "ranks").flatten().tolist()
    assert together == [rank - rank % 2, rank - rank % 2 + 1]


def check_all(rank: int) -> None:
    check_pairs(rank)
    check_tokens_that_are_split(rank)
    check_tokens_that_all_have(rank)
    check_everything_to_one_expert_and_ids_that_are_none(rank)


def test_results_are_those_of_one_process_and_bytes_the_least_that_routing_needs() -> None:
    on_ranks(RANKS, check_all)


def test_a_row_of_bytes_has_a_token_and_its_choices() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows = tokens_of(0, 5, 8, dtype)
        packed = rows.pack()
        assert packed.shape == (5, rows.size)
        for got, expected in zip(rows.unpack(packed), rows, strict=True):
            assert torch.equal(got, expected)
        assert [len(one) for one in rows.unpack(packed[:0])] == [0, 0, 0]

"""Models that choose, weigh and sum like a mixture of experts, and are none: nothing happens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten

import moecc
from tests.models import relative_error

HIDDEN = 16


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 8), nn.ReLU(), nn.Linear(8, HIDDEN))


class TopKAttention(nn.Module):
    """Every query attends to its four best keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        best, ids = scores.topk(4, dim=-1)
        weights = torch.full_like(scores, float("-inf")).scatter(-1, ids, best).softmax(-1)
        return weights @ self.v(x)


class Retrieval(nn.Module):
    """The nearest memories, averaged by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(32, HIDDEN))
        self.values = nn.Parameter(torch.randn(32, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = (x @ self.keys.T).softmax(-1).topk(3, dim=-1)
        return torch.einsum("bsk,bskh->bsh", weights, self.values[ids])


class Bags(nn.Module):
    """A weighted EmbeddingBag."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, 32)
        self.bag = nn.EmbeddingBag(32, HIDDEN, mode="sum")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.score(x).view(-1, 32).softmax(-1).topk(3, dim=-1)
        return self.bag(ids, per_sample_weights=weights).view_as(x)


class ProductKeys(nn.Module):
    """PEER: experts of one neuron each, found by product keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, 2 * 8)
        self.keys = nn.Parameter(torch.randn(2, 6, 8))
        self.down, self.up = nn.Embedding(36, HIDDEN), nn.Embedding(36, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.query(x).chunk(2, dim=-1)
        best1, ids1 = (left @ self.keys[0].T).topk(3, dim=-1)
        best2, ids2 = (right @ self.keys[1].T).topk(3, dim=-1)
        every = (best1[..., :, None] + best2[..., None, :]).flatten(-2)
        ids = (ids1[..., :, None] * 6 + ids2[..., None, :]).flatten(-2)
        best, where = every.topk(4, dim=-1)
        ids = ids.gather(-1, where)
        inner = F.gelu(torch.einsum("bsh,bskh->bsk", x, self.down(ids)))
        return torch.einsum("bsk,bskh->bsh", inner * best.softmax(-1), self.up(ids))


class SoftMoe(nn.Module):
    """Every slot is a mean of all tokens, and every token a mean of all slots."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(HIDDEN, 4, 2))
        self.experts = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bsh,hec->bsec", x, self.slots)
        rows = torch.einsum("bsec,bsh->bech", scores.softmax(1), x)
        out = torch.stack([expert(rows[:, e]) for e, expert in enumerate(self.experts)], dim=1)
        return torch.einsum("bsec,bech->bsh", scores.flatten(2).softmax(-1).view_as(scores), out)


class BeamStep(nn.Module):
    """The best continuations of every beam."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, 20)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = self.head(x).log_softmax(-1)
        best, ids = scores.flatten(1).topk(4, dim=-1)
        rows = x.gather(1, (ids // 20).unsqueeze(-1).expand(-1, -1, HIDDEN))
        return best, ids % 20, rows


class Stack(nn.Module):
    """One MLP after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Ensemble(Stack):
    """All MLPs, averaged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x) for layer in self.layers]).mean(0)


class MixtureOfDepths(nn.Module):
    """Only the best half of the tokens go through the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, 1)
        self.layer = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.score(x).squeeze(-1).topk(4, dim=1)
        where = ids.unsqueeze(-1).expand(-1, -1, HIDDEN)
        done = self.layer(x.gather(1, where)) * weights.sigmoid().unsqueeze(-1)
        return x.scatter_add(1, where, done)


class AttentionExperts(nn.Module):
    """MoA: each token chooses two of four query projections, keys and values are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, 4, bias=False)
        self.query = nn.Parameter(torch.randn(4, HIDDEN, 8) / 4)
        self.out = nn.Parameter(torch.randn(4, 8, HIDDEN) / 4)
        self.k, self.v = nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.score(x).softmax(-1).topk(2, dim=-1)
        query = torch.einsum("bsh,bskhd->bskd", x, self.query[ids])
        scores = torch.einsum("bskd,btd->bskt", query, self.k(x)).softmax(-1)
        heads = torch.einsum("bskt,btd->bskd", scores, self.v(x))
        return torch.einsum("bskd,bskdh,bsk->bsh", heads, self.out[ids], weights)


class SparseAutoencoder(nn.Module):
    """Only a token's strongest features are decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(HIDDEN, 64)
        self.decode = nn.Linear(64, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, ids = self.encode(x).relu().topk(5, dim=-1)
        return self.decode(x.new_zeros(*x.shape[:-1], 64).scatter(-1, ids, values))


class Codebook(nn.Module):
    """Vector quantisation."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(32, HIDDEN)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.cdist(x, self.codes.weight.expand(x.shape[0], -1, -1)).argmin(-1)
        return self.codes(ids), ids


class LowRank(nn.Module):
    """Several adapters on one layer, all of them added."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, HIDDEN)
        self.down = nn.ParameterList(torch.randn(HIDDEN, 4) / 4 for _ in range(3))
        self.up = nn.ParameterList(torch.randn(4, HIDDEN) / 4 for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + sum(
            x @ down @ up for down, up in zip(self.down, self.up, strict=True)
        )


MODELS: tuple[Callable[[], nn.Module], ...] = (
    TopKAttention, Retrieval, Bags, ProductKeys, SoftMoe, BeamStep, Stack, Ensemble,
    MixtureOfDepths, AttentionExperts, SparseAutoencoder, Codebook, LowRank,
)  # fmt: skip


def same(got: Any, expected: Any) -> None:
    leaves, form = tree_flatten(got)
    wanted, wanted_form = tree_flatten(expected)
    assert form == wanted_form
    for one, other in zip(leaves, wanted, strict=True):
        assert relative_error(one, other) < 1e-5


def names(model: nn.Module) -> set[tuple[str, str]]:
    return {(path, name) for path, one in model.named_modules() for name in one.__dict__}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_mixture_of_experts_is_left_as_it_was(kind: type[nn.Module]) -> None:
    model = kind().eval()
    inputs = [torch.randn(2, length, HIDDEN) for length in (9, 12)]
    own = kind.forward
    weights = {
        name: (id(one), one.clone()) for name, one in model.state_dict(keep_vars=True).items()
    }
    attributes = names(model)
    random = torch.random.get_rng_state()
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        run = torch.compile(model, backend="moecc", dynamic=True, options={"inner": "eager"})
        for x, result in zip(inputs, expected, strict=True):
            same(run(x), result)
    report = moecc.report(model)
    assert report.graphs
    assert not any(graph.blocks for graph in report.graphs)
    misses = [miss["why"] for graph in report.graphs for miss in graph.misses]
    assert not misses or kind is AttentionExperts  # whose reason is true: it does choose matrices
    assert report.eager is None
    assert kind.forward is own
    assert torch.equal(torch.random.get_rng_state(), random)
    assert names(model) - attributes == {("", "_is_torch_compile")}  # torch's own
    for name, one in model.state_dict(keep_vars=True).items():
        assert id(one) == weights[name][0]
        assert torch.equal(one, weights[name][1])

"""What a router computes is read from the graph."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moecc.passes.describe_blocks import describe_blocks
from moecc.passes.detect_moe import detect_moe
from moecc.passes.ir import Program
from moecc.passes.options import Options
from tests.models import HIDDEN, capture, tokens
from tests.passes import dispatched
from tests.passes.routed import ACTIVE, EXPERTS, Chosen, Route, Routed, described, router


def switch(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(x).softmax(-1).max(-1)
    return ids.unsqueeze(-1), weights.unsqueeze(-1)


def mixtral(r: Route, x: torch.Tensor) -> Chosen:
    weights = F.softmax(r.proj(x), dim=1, dtype=torch.float)
    weights, ids = torch.topk(weights, ACTIVE, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return ids, weights


def written_over(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(x).sigmoid().topk(ACTIVE)
    weights.div_(weights.sum(-1, keepdim=True) + 1e-6).mul_(4.0)
    return ids, weights


def gpt_oss(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = torch.topk(F.linear(x, r.other.weight, r.other.bias), ACTIVE, dim=-1)
    return ids, weights.softmax(-1)


def kolibri(r: Route, x: torch.Tensor) -> Chosen:
    logits = x @ r.matrix
    ids = (logits + r.bias).topk(ACTIVE).indices
    return ids, logits.gather(-1, ids).sigmoid()


def deepseek_v3(r: Route, x: torch.Tensor) -> Chosen:
    scores = r.proj(x).sigmoid()
    biased = scores + r.bias
    groups = biased.view(-1, 4, EXPERTS // 4)
    best = groups.topk(2, dim=-1)[0].sum(dim=-1).topk(2, dim=-1)[1]
    mask = torch.zeros(x.shape[0], 4).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, EXPERTS // 4).reshape(-1, EXPERTS)
    ids = biased.masked_fill(~mask.bool(), float("-inf")).topk(ACTIVE, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5


def groups_apart(r: Route, x: torch.Tensor) -> Chosen:
    """Mask while the scores are [T, groups, experts a group]; take the weights from the rest."""
    scores = r.proj(x).softmax(-1)
    groups = scores.view(-1, 4, 2)
    best = groups.amax(-1).topk(2, dim=-1)[1]
    mask = torch.ones(x.shape[0], 4, dtype=torch.bool).scatter_(1, best, False)
    weights, ids = groups.masked_fill(mask.unsqueeze(-1), 0.0).flatten(1).topk(ACTIVE, dim=-1)
    return ids, weights * 16


def sorted_scores(r: Route, x: torch.Tensor) -> Chosen:
    scores = r.proj(x).softmax(-1)
    ids = scores.argsort(dim=-1, descending=True)[:, :ACTIVE]
    return ids, torch.take_along_dim(scores, ids, dim=-1)


def norms(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(r.norm(x)).softmax(-1).topk(ACTIVE)
    return ids, weights / torch.norm(weights, p=1, dim=-1, keepdim=True)


def clamped(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(x).softmax(-1).topk(ACTIVE)
    return ids, weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)


def small_mlp(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.wide(F.gelu(r.squeeze(x))).softmax(-1).topk(ACTIVE)
    return ids, weights


def capped(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = (torch.tanh(r.proj(x) / 30.0) * 30.0).softmax(-1).topk(ACTIVE)
    return ids, weights


def kept_bias(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = (r.proj(x).sigmoid() + r.bias).topk(ACTIVE)
    return ids, weights


def learned(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = (r.proj(x) * r.scale).softmax(-1).topk(ACTIVE)
    return ids, weights * r.gain[ids]


def sqrt_softplus(r: Route, x: torch.Tensor) -> Chosen:
    scores = F.softplus(r.proj(x)).sqrt()
    ids = (scores + r.bias).topk(ACTIVE)[1]
    return ids, scores.gather(1, ids)


def other_scores(r: Route, x: torch.Tensor) -> Chosen:
    logits = r.proj(x)
    ids = logits.sigmoid().topk(ACTIVE)[1]
    return ids, logits.softmax(-1).gather(1, ids)


def other_matrix(r: Route, x: torch.Tensor) -> Chosen:
    ids = r.proj(x).topk(ACTIVE)[1]
    return ids, r.other(x).softmax(-1).gather(1, ids)


def balanced(r: Route, x: torch.Tensor) -> Chosen:
    logits = r.proj(x)
    plan = logits.exp()
    for _ in range(3):
        plan = plan / plan.sum(dim=1, keepdim=True)
        plan = plan / plan.sum(dim=0, keepdim=True)
    ids = plan.topk(ACTIVE)[1]
    return ids, logits.softmax(-1).gather(1, ids)


def noisy(r: Route, x: torch.Tensor) -> Chosen:
    logits = r.proj(x)
    logits = logits + torch.randn_like(logits) * F.softplus(r.other(x))
    weights, ids = logits.topk(ACTIVE)
    return ids, weights.softmax(-1)


def jittered(r: Route, x: torch.Tensor) -> Chosen:
    x = x * torch.empty_like(x).uniform_(0.99, 1.01)
    weights, ids = r.proj(x).softmax(-1).topk(ACTIVE)
    return ids, weights


def limited(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(x).softmax(-1).topk(ACTIVE)
    hot = F.one_hot(ids, EXPERTS).flatten(0, 1)
    rank = (hot.cumsum(0) * hot).sum(-1).view_as(ids)
    return ids, weights * (rank <= 3)


def unweighted(r: Route, x: torch.Tensor) -> Chosen:
    ids = r.proj(x).topk(ACTIVE)[1]
    return ids, torch.ones_like(ids, dtype=x.dtype)


READ = [
    (switch, "softmax → top-1"),
    (mixtral, "softmax → top-2 → ÷ sum"),
    (written_over, "sigmoid → top-2 → ÷ (sum + 1e-06) → × 4"),
    (gpt_oss, "logits → top-2 → softmax"),
    (kolibri, "logits + bias → top-2 → sigmoid"),
    (
        deepseek_v3,
        "sigmoid + bias → 2 of 4 groups (sum of top 2) → top-2 → ÷ (sum + 1e-20) → × 2.5",
    ),
    (groups_apart, "softmax → 2 of 4 groups (max, the rest 0) → top-2 → × 16"),
    (sorted_scores, "softmax → top-2"),
    (norms, "layer norm → logits → softmax → top-2 → ÷ sum"),
    (clamped, "softmax → top-2 → ÷ max(sum, 1e-09)"),
    (small_mlp, "linear 4 → gelu → logits → softmax → top-2"),
    (capped, "logits → soft cap 30 → softmax → top-2"),
    (kept_bias, "sigmoid + bias, kept in the weights → top-2"),
    (learned, "logits → × learned scale → softmax → top-2 → × learned scale of the expert"),
    (sqrt_softplus, "sqrt-softplus + bias → top-2"),
    (other_scores, "sigmoid → top-2 → weights from softmax"),
    (other_matrix, "logits → top-2 → weights from another matrix: softmax"),
    (balanced, "exp → sinkhorn (3 rounds) → top-2 → weights from softmax"),
    (noisy, "logits → + noise → top-2 → softmax"),
    (jittered, "× noise → logits → softmax → top-2"),
    (limited, "softmax → top-2 → capacity (place ≤ 3)"),
    (unweighted, "logits → top-2 → all weights 1"),
]


@pytest.mark.parametrize(("how", "text"), READ, ids=lambda one: getattr(one, "__name__", ""))
def test_reads_a_hand_written_router(
    how: Callable[[Route, torch.Tensor], Chosen], text: str
) -> None:
    found = router(how)
    assert str(found) == text
    assert not found.unknown
    assert found.active == (1 if how is switch else 2)


def test_knows_the_matrix_its_bias_and_the_dtype() -> None:
    plain, biased = router(mixtral), router(gpt_oss)
    assert plain.logits is not None
    assert biased.logits is not None
    assert (plain.logits.classes, plain.logits.features, plain.logits.bias) == (8, 16, False)
    assert biased.logits.bias
    assert plain.dtype == "float32"


def test_names_the_dtype_that_scores_are_computed_in() -> None:
    model = Routed(mixtral).to(torch.bfloat16)
    block = described(model, tokens(6))
    assert block.router is not None
    assert (str(block.router), block.router.dtype) == ("softmax → top-2 → ÷ sum", "float32")


def test_a_description_is_plain_data() -> None:
    plain = router(deepseek_v3).to_dict()
    assert [step["step"] for step in plain["steps"]] == [
        "Logits", "Function", "Bias", "Groups", "TopK", "Normalise", "Scale",
    ]  # fmt: skip
    assert plain["steps"][3]["fill"] == "-inf"
    assert (plain["matrix"], plain["unknown"]) == ([8, 16], False)
    inner = router(other_scores).to_dict()["steps"][-1]
    assert inner["steps"][-1] == {"step": "Function", "name": "softmax"}


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (dispatched.Dispatched, "softmax → top-1 → capacity (place < 2)"),
        (dispatched.TwoChoices, "softmax → top-2 → capacity (place < 2) → ÷ max(sum, 1e-09)"),
        (dispatched.Stacked, "softmax → top-2 → capacity (place < 2)"),
        (dispatched.SpareColumn, "softmax → top-1 → capacity (place < 2)"),
        (dispatched.ClampedSlots, "softmax → top-2 → capacity (place < 2)"),
    ],
)
def test_reads_capacities_of_dispatched_blocks(
    model: type[dispatched.Dispatched], text: str
) -> None:
    assert str(described(model()).router) == text


class DenseGates(nn.Module):
    """Experts all computed, and weighted by gates that are zero but for a top-k."""

    def __init__(self, gates: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gates = gates
        self.proj = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * 8))
        self.low = nn.Parameter(torch.randn(EXPERTS, 8, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("th,ehf->tef", x, self.up).chunk(2, -1)
        y = torch.einsum("tef,efh->teh", F.silu(gate) * up, self.low)
        return (y * self.gates(self.proj(x)).unsqueeze(-1)).sum(1)


def scattered(logits: torch.Tensor) -> torch.Tensor:
    weights, ids = logits.softmax(-1).topk(ACTIVE)
    return torch.zeros_like(logits).scatter(-1, ids, weights)


def softmax_of_scattered(logits: torch.Tensor) -> torch.Tensor:
    best, ids = logits.topk(ACTIVE)
    return torch.full_like(logits, float("-inf")).scatter_(-1, ids, best).softmax(-1)


def masked_softmax(logits: torch.Tensor) -> torch.Tensor:
    mask = torch.full_like(logits, float("-inf")).scatter(-1, logits.topk(ACTIVE)[1], 0.0)
    return (logits + mask).softmax(-1)


def one_hot_sum(logits: torch.Tensor) -> torch.Tensor:
    weights, ids = logits.sigmoid().topk(ACTIVE)
    return (F.one_hot(ids, EXPERTS) * weights.unsqueeze(-1)).sum(1)


def masked_then_normalised(logits: torch.Tensor) -> torch.Tensor:
    scores = logits.sigmoid()
    kept = scores * torch.zeros_like(scores).scatter(-1, scores.topk(ACTIVE)[1], 1.0)
    return kept / (kept.sum(-1, keepdim=True) + 1e-20)


@pytest.mark.parametrize(
    ("gates", "text"),
    [
        (scattered, "softmax → top-2"),
        (softmax_of_scattered, "logits → top-2 → softmax"),
        (masked_softmax, "logits → top-2 → softmax"),
        (one_hot_sum, "sigmoid → top-2"),
        (masked_then_normalised, "sigmoid → top-2 → ÷ (sum + 1e-20)"),
    ],
)
def test_reads_gates_over_all_experts(
    gates: Callable[[torch.Tensor], torch.Tensor], text: str
) -> None:
    assert str(described(DenseGates(gates)).router) == text


def test_a_strange_node_anywhere_in_a_router_is_described_and_no_crash() -> None:
    graph = capture(Routed(deepseek_v3), tokens(6, torch.float32)).gm
    (block,) = detect_moe(Program(gm=graph), Options()).program.blocks
    names = [node.name for node in graph.graph.nodes if node.op.startswith("call_")]
    router_nodes = names[: names.index(block.weights) + 1]
    assert len(router_nodes) > 20
    for name in router_nodes:
        copy = torch.fx.GraphModule(graph, graph.graph)
        node = next(one for one in copy.graph.nodes if one.name == name)
        for args in (node.args, node.args[:1], node.args[::-1], ()):
            node.op, node.target, node.args, node.kwargs = "call_function", torch.erfinv, args, {}
            (found,) = describe_blocks(copy.graph, (block,))
            assert found.router is not None
            assert found.router.unknown, name

"""What a router computes is read from the graph, and what cannot be read is said to be unknown."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moecc.passes.describe_blocks import describe_blocks
from moecc.passes.detect_moe import detect_moe
from moecc.passes.ir import MoeBlock, Program
from moecc.passes.options import Options
from moecc.passes.router.description import Router
from tests.models import HIDDEN, BatchedMoe, capture, tokens

EXPERTS, ACTIVE = 8, 2
Chosen = tuple[torch.Tensor, torch.Tensor]


class Route(nn.Module):
    """Everything that a router may have; `how` says what it does with it."""

    def __init__(self, how: Callable[["Route", torch.Tensor], Chosen]) -> None:
        super().__init__()
        self.how = how
        self.proj = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.other = nn.Linear(HIDDEN, EXPERTS)
        self.squeeze = nn.Linear(HIDDEN, 4)
        self.wide = nn.Linear(4, EXPERTS)
        self.norm = nn.LayerNorm(HIDDEN)
        self.bias = nn.Parameter(torch.randn(EXPERTS))
        self.scale = nn.Parameter(torch.rand(1))
        self.gain = nn.Parameter(torch.rand(EXPERTS))
        self.matrix = nn.Parameter(torch.randn(HIDDEN, EXPERTS))

    def forward(self, x: torch.Tensor) -> Chosen:
        return self.how(self, x)


class Routed(BatchedMoe):
    def __init__(self, how: Callable[[Route, torch.Tensor], Chosen]) -> None:
        super().__init__(torch.float32, active=ACTIVE, experts=EXPERTS)
        self.pick = Route(how)


def described(model: nn.Module, *inputs: torch.Tensor) -> MoeBlock:
    graph = capture(model, *(inputs or (tokens(6, torch.float32),))).gm
    (block,) = detect_moe(Program(gm=graph), Options()).program.blocks
    return block


def router(how: Callable[[Route, torch.Tensor], Chosen]) -> Router:
    found = described(Routed(how)).router
    assert found is not None
    return found


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


def token_softmax(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(x).softmax(0).topk(ACTIVE)
    return ids, weights


def lowest(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(x).softmax(-1).topk(ACTIVE, largest=False)
    return ids, weights


def two_choices(r: Route, x: torch.Tensor) -> Chosen:
    """Ids of one top-k, weights of another."""
    return r.proj(x).topk(ACTIVE)[1], r.other(x).sigmoid().topk(ACTIVE)[0]


def shifted_ids(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(x).softmax(-1).topk(ACTIVE)
    return (ids + 1) % EXPERTS, weights


def one_expert_always(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(x).softmax(-1).topk(ACTIVE)
    ids[:, 1] = 0
    return ids, weights


def first_weight_halved(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(x).softmax(-1).topk(ACTIVE)
    weights[:, 0] *= 0.5
    return ids, weights


def reversed_weights(r: Route, x: torch.Tensor) -> Chosen:
    weights, ids = r.proj(x).softmax(-1).topk(ACTIVE)
    return ids, weights.flip(-1)


def gathered_elsewhere(r: Route, x: torch.Tensor) -> Chosen:
    scores = r.proj(x).softmax(-1)
    ids = scores.topk(ACTIVE)[1]
    return ids, scores.gather(1, ids.flip(-1))


def sum_of_another(r: Route, x: torch.Tensor) -> Chosen:
    scores = r.proj(x).softmax(-1)
    weights, ids = scores.topk(ACTIVE)
    return ids, weights / scores.topk(3)[0].sum(-1, keepdim=True)


def token_bias(r: Route, x: torch.Tensor) -> Chosen:
    """A bias that is computed from the token is none."""
    weights, ids = (r.proj(x).sigmoid() + r.other(x)).topk(ACTIVE)
    return ids, weights


def top_p(r: Route, x: torch.Tensor) -> Chosen:
    """A cumulative probability is no place in a queue."""
    weights, ids = r.proj(x).softmax(-1).topk(ACTIVE)
    return ids, weights * (weights.cumsum(-1) <= 0.9)


def threshold(r: Route, x: torch.Tensor) -> Chosen:
    scores = r.proj(x).softmax(-1)
    weights, ids = scores.masked_fill(scores < 0.1, 0.0).topk(ACTIVE)
    return ids, weights


def other_groups(r: Route, x: torch.Tensor) -> Chosen:
    """Groups are chosen by other scores than those that they mask."""
    scores = r.proj(x).softmax(-1)
    best = r.other(x).view(-1, 4, 2).amax(-1).topk(2, dim=-1)[1]
    mask = torch.zeros(x.shape[0], 4).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, EXPERTS)
    weights, ids = scores.masked_fill(~mask.bool(), 0.0).topk(ACTIVE)
    return ids, weights


def worst_groups(r: Route, x: torch.Tensor) -> Chosen:
    """The best groups are those masked."""
    scores = r.proj(x).softmax(-1)
    best = scores.view(-1, 4, 2).amax(-1).topk(2, dim=-1)[1]
    mask = torch.zeros(x.shape[0], 4).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, EXPERTS)
    weights, ids = scores.masked_fill(mask.bool(), 0.0).topk(ACTIVE)
    return ids, weights


def scattered_groups(r: Route, x: torch.Tensor) -> Chosen:
    """The mask of a group covers every fourth expert, its score two neighbours."""
    scores = r.proj(x).softmax(-1)
    best = scores.view(-1, 4, 2).amax(-1).topk(2, dim=-1)[1]
    mask = torch.zeros(x.shape[0], 4).scatter_(1, best, 1)
    mask = mask.unsqueeze(1).expand(-1, 2, 4).reshape(-1, EXPERTS)
    weights, ids = scores.masked_fill(~mask.bool(), 0.0).topk(ACTIVE)
    return ids, weights


def cosine(r: Route, x: torch.Tensor) -> Chosen:
    matrix = F.normalize(r.proj.weight, dim=-1)
    weights, ids = F.linear(F.normalize(x, dim=-1), matrix).softmax(-1).topk(ACTIVE)
    return ids, weights


def half_dropped(r: Route, x: torch.Tensor) -> Chosen:
    """Ids are replaced, and the weights stay."""
    weights, ids = r.proj(x).softmax(-1).topk(ACTIVE)
    return ids.masked_fill(ids == 7, 0), weights


def random_choice(r: Route, x: torch.Tensor) -> Chosen:
    scores = r.proj(x).softmax(-1)
    ids = torch.multinomial(scores, ACTIVE)
    return ids, scores.gather(1, ids)


UNREAD = [
    (token_softmax, "unknown: softmax ({}), softmax does not run over the last dimension"),
    (lowest, "unknown: topk ({}), it takes the lowest scores"),
    (two_choices, "logits → top-2 → unknown: weights ({})"),
    (shifted_ids, "unknown: ids_1 ({}), experts are chosen"),
    (one_expert_always, "unknown: setitem ({}), experts are chosen"),
    (first_weight_halved, "top-2 → unknown: imul ({}), it writes into weights in place"),
    (reversed_weights, "softmax → top-2 → unknown: weights_1 ({})"),
    (gathered_elsewhere, "softmax → top-2 → unknown: weights ({})"),
    (sum_of_another, "softmax → top-2 → unknown: weights_1 ({})"),
    (token_bias, "unknown: add ({}) → top-2"),
    (top_p, "softmax → top-2 → unknown: weights_1 ({})"),
    (threshold, "unknown: masked_fill ({}) → top-2"),
    (other_groups, "groups are chosen by other scores than their experts → top-2"),
    (worst_groups, "the mask keeps others than it was made from → top-2"),
    (scattered_groups, "unknown: masked_fill ({}) → top-2"),
    (cosine, "unknown: linear ({}), its matrix is computed → softmax → top-2"),
    (half_dropped, "ids are replaced and their weights are not"),
    (random_choice, "unknown: ids ({}), experts are chosen in a way that is not known"),
]


@pytest.mark.parametrize(("how", "text"), UNREAD, ids=lambda one: getattr(one, "__name__", ""))
def test_says_where_reading_stopped(
    how: Callable[[Route, torch.Tensor], Chosen], text: str
) -> None:
    found = router(how)
    (unknown,) = found.unknown
    assert unknown.source.startswith("test_router.py:")
    assert text.format(unknown.source) in str(found)
    assert found.to_dict()["unknown"]


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

"""What a router computes is read from the graph, and what cannot be read is said to be unknown."""

import re
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
from moecc.records import all_records
from moecc.tiny import tiny_model
from tests.models import HIDDEN, BatchedMoe, capture, tokens
from tests.passes import dispatched

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


GROUPED = "sigmoid + bias → 1 of 2 groups (sum of top 2) → top-2"
SHARED = "gated silu MLP of 48"
_MLP = (
    "linear 32 → RMS norm → × learned scales → linear 32 → gelu → linear 32 → gelu → logits → "
    "softmax + bias → top-1 → class 8 is no expert"
)
FAMILIES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "aria": (("logits → top-2 → softmax",), SHARED),
    "beam": ((f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5 on the output",), None),
    "cohere2_moe": (("logits → top-2 → softmax",), f"{SHARED}, the sum ÷ 2"),
    "deepseek_v2": (("softmax → 1 of 2 groups (max, the rest 0) → top-2",), SHARED),
    "deepseek_v3": ((f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",), SHARED),
    "deepseek_v4": (
        (
            "sqrt-softplus → 2 from a table of 128 rows (hash routing) → ÷ (sum + 1e-20) → × 1.5",
            "sqrt-softplus + bias → top-2 → ÷ (sum + 1e-20) → × 1.5",
        ),
        SHARED,
    ),
    "dots1": ((GROUPED,), SHARED),
    "ernie4_5_moe": (("softmax + bias → top-2 → ÷ max(sum, 1e-12)",), SHARED),
    "flint": (("sigmoid → top-2 → ÷ sum",), SHARED),
    "gemma4": (
        (
            "earlier hidden state → RMS norm → × learned scales → × 0.125 → logits → softmax → "
            "top-2 → ÷ sum → × learned scale of the expert",
        ),
        None,
    ),
    "hy_v3": (("sigmoid + bias → top-2 → ÷ (sum + 1e-20) → × 2.826",), SHARED),
    "inkling": (
        (
            "sigmoid → first 8 of 10 + bias → top-2 → weights from first 8 of 10 → with 2 unchosen "
            "beside → log_sigmoid → softmax → × 8 → × learned scale → first 2 of 4",
        ),
        "unknown: sum_1",
    ),
    "kolibri1": (("logits + bias → top-2 → sigmoid",), SHARED),
    "lfm2_moe": (("sigmoid + bias → top-2 → ÷ (sum + 1e-06)",), None),
    "minimax_m3_vl": (
        ("sigmoid + bias → top-2 → ÷ sum → × 2 on the output",),
        "gated sigmoid MLP of 48",
    ),
    "mistral4": (
        ("softmax → 1 of 2 groups (sum of top 2, the rest 0) → top-2 → ÷ (sum + 1e-20)",),
        SHARED,
    ),
    "mixtral": (("softmax → top-2 → ÷ sum",), None),
    "muse_spark": (
        (
            "earlier hidden state → logits → × 0.176777 → sigmoid + bias → top-2 → "
            "÷ (sum + 1e-15) → on what becomes of each output",
        ),
        None,
    ),
    "nemotron_h": ((f"{GROUPED} → ÷ (sum + 1e-20)",), "relu → square MLP of 48"),
    "olmoe": (("softmax → top-2",), None),
    "openai_privacy_filter": (("logits → top-2 → softmax → ÷ 2 → × 2 on the output",), None),
    "phimoe": (("logits → sparsemixer top-2 (softmax of logits within 0.02)",), None),
    "qwen2_moe": (("softmax → top-2",), f"{SHARED} × sigmoid gate"),
    "zaya": ((_MLP, f"unknown: router_hidden_states_2 → {_MLP.partition(' → ')[2]}"), None),
}
"""Family → what its router and its shared expert are in words; lines of the model are left out."""
ALIKE = {
    "afmoe": "sigmoid + bias → top-2 → ÷ (sum + 1e-20)",
    "axk1": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "axk2": "sigmoid + bias → top-2 → ÷ (sum + 1e-20) → × 2.5",
    "bailing_hybrid": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "dbrx": "softmax → top-2 → ÷ sum",
    "deepseek_ocr2": "softmax → top-2",
    "deepseek_v32": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "dots3_note": f"{GROUPED} → ÷ (sum + 1e-20)",
    "ernie4_5_vl_moe": "softmax + bias → top-2 → ÷ max(sum, 1e-12)",
    "exaone_moe": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "flex_olmo": "softmax → top-2",
    "glm4_moe": f"{GROUPED} → ÷ (sum + 1e-20)",
    "glm4_moe_lite": f"{GROUPED} → ÷ (sum + 1e-20) → × 1.8",
    "glm4v_moe": f"{GROUPED} → ÷ (sum + 1e-20)",
    "glm5_next": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "glm_moe_dsa": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "gpt_oss": "logits → top-2 → softmax",
    "granitemoe": "logits → top-2 → softmax",
    "granitemoe_swa": "logits → top-2 → softmax",
    "granitemoehybrid": "logits → top-2 → softmax",
    "granitemoeshared": "logits → top-2 → softmax",
    "hunyuan_v1_moe": "softmax → top-2 → ÷ sum",
    "hy_v4": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.827",
    "inkling2": "sigmoid + bias → top-2 → ÷ (sum + 1e-20) → × 8",
    "jamba": "softmax → top-2",
    "jetmoe": "logits → top-2 → softmax",
    "kimi_linear": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.446",
    "laguna": "sigmoid + bias → top-2 → ÷ sum",
    "llama4": "logits → top-1 → sigmoid → on the input",
    "longcat_flash": "softmax + bias → top-2 → × 6",
    "mellum": "softmax → top-2 → ÷ sum",
    "mimo_v2_flash": f"{GROUPED} → ÷ (sum + 1e-20)",
    "minimax": "softmax → top-2 → ÷ sum",
    "minimax_m2": "sigmoid + bias → top-2 → ÷ sum",
    "mistral_large4": FAMILIES["mistral4"][0][0],
    "qwen3_5_moe": "softmax → top-2 → ÷ sum",
    "qwen3_moe": "softmax → top-2 → ÷ sum",
    "qwen3_next": "softmax → top-2 → ÷ sum",
    "qwen3_omni_moe": "softmax → top-2 → ÷ sum",
    "qwen3_vl_moe": "softmax → top-2 → ÷ sum",
    "qwen4_exp": "softmax → top-2 → ÷ sum",
    "solar_open": f"{GROUPED} → ÷ (sum + 1e-20)",
    "switch_transformers": "softmax → top-1 → capacity (place ≤ 64)",
    "unlimited_ocr": "softmax → top-2",
}
"""Families whose router is like another's."""


def blocks_of_family(family: str, **changes: object) -> list[MoeBlock]:
    """Compile a tiny instance as a user does; give its blocks."""
    model = tiny_model(family, **changes)
    ids = {"input_ids": torch.randint(3, 99, (2, 16))}
    if getattr(model.config, "is_encoder_decoder", False):
        ids["decoder_input_ids"] = ids["input_ids"]
    before = len(all_records())
    options = {"inner": "eager", "kernels": "torch"}
    with torch.no_grad():
        torch.compile(model, backend="moecc", options=options)(**ids)
    return [block for record in all_records()[before:] for block in record.blocks]


def without_lines(text: str) -> str:
    return re.sub(r" \(modeling_\w+\.py:\d+\)", "", text)


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_the_router_and_the_shared_expert_of_a_family(family: str) -> None:
    pytest.importorskip("transformers")
    routers, shared = FAMILIES[family]
    blocks = blocks_of_family(family)
    assert tuple(dict.fromkeys(without_lines(str(one.router)) for one in blocks)) == routers
    found = {without_lines(str(one.shared)) if one.shared else None for one in blocks}
    assert found == {shared}


@pytest.mark.slow
@pytest.mark.parametrize("family", ALIKE)
def test_reads_the_router_of_every_family(family: str) -> None:
    assert {str(one.router) for one in blocks_of_family(family)} == {ALIKE[family]}


def test_reads_a_soft_cap_that_a_family_can_be_given() -> None:
    pytest.importorskip("transformers")
    blocks = blocks_of_family("laguna", moe_router_logit_softcapping=30.0)
    assert {str(one.router) for one in blocks} == {
        "logits → soft cap 30 → sigmoid + bias → top-2 → ÷ sum"
    }


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

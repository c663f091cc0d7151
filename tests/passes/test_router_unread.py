"""What of a router cannot be read is said to be unknown, and where."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.passes.routed import ACTIVE, EXPERTS, Chosen, Route, router


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
    assert unknown.source.startswith("test_router_unread.py:")
    assert text.format(unknown.source) in str(found)
    assert found.to_dict()["unknown"]

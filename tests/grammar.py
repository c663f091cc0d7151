"""A grammar of MoE blocks: a `Sentence` says what one is made of, `source` writes it as users do.

Blocks are source text, so that a failing example prints the module that it is about.
"""

import itertools
import linecache
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.grammar_styles import (
    BODIES,
    GRAPH_STYLES,
    MODULE_STYLES,
    STACKED_STYLES,
    act,
    first,
    second,
)

HIDDEN, INNER = 16, 8
STYLES = tuple(BODIES)
PAIRS = {"capacity": ("float32",), "grouped": ("bfloat16",), "titan": ("bfloat16",)}
"""Data types of the styles that do not take all."""

_BEFORE = {
    "writes its input": "x.add_(1)",
    "tracks loads": "self.load += F.one_hot(ids, self.count).sum((0, 1))",
    "thresholds weights": "weights = torch.where(weights > 0.4, weights, 0)",
    "squares weights": "weights = weights * weights",
    "shifts tokens": "x = x.roll(1, 0)",
    "turns weights round": "weights = weights.flip(-1)",
    "uses other ids": "ids = (ids + 1) % self.count",
    "goes by size": "ids = ids if x.shape[0] < 500 else ids.flip(-1)",
}
"""Lines between the router and the experts."""
_AFTER = {
    "squashes the sum": "out = out.tanh()",
    "shifts the sum": "out = out.roll(1, 0)",
    "doubles large batches": "out = out * 2 if x.shape[0] > 500 else out",
    "reads an expert's weights": "out = out + {weight}.mean()",
    "goes by values": "out = out if (out > -9).all() else out * 2",
    "adds tokens that had little": "out = torch.where(weights.sum(-1, keepdim=True) > 0.9, out, x)",
}
"""Lines between the experts and what follows."""
_TERM = {
    "scales one expert": "y = y * (2 if e == 1 else 1)",
    "squares a term's weight": "w = w * w",
    "shifts results": "y = y.roll(1, 0)",
    "thresholds terms": "y = torch.where(w > 0.1, y, 0 * y)",
    "clamps results": "y = y.clamp(-30, 30)",
    "squashes results": "y = y.tanh()",
    "goes by how many tokens": "y = y * (2 if y.shape[0] > 190 else 1)",
    "goes by len": "y = y * (2 if len(y) > 190 else 1)",
    "drops beyond a capacity": "y = torch.cat([y[:190], 0 * y[190:]])",
    "drops beyond a small capacity": "y = torch.cat([y[:3], 0 * y[3:]])",
    "masks beyond a capacity": "y = y * (torch.arange(y.shape[0]) < 190)[:, None]",
    "skips one expert": "y = 0 * y if e == 2 else y",
    "adds means": "y = y + y.mean(0)",
    "goes by ranks": "y = y * (torch.ones_like(w).cumsum(0) < 190)",
}
"""Lines in a loop: `y` [n, H] is what expert `e` gave, `w` [n, 1] its weights."""
_TERMS = {
    "turns results round": "y = y.flip(1)",
    "squashes results": "y = y.tanh()",
    "clamps results": "y = y.clamp(-30, 30)",
    "scales one expert": "y = y * torch.where(ids == 1, 2, 1)[..., None]",
    "thresholds terms": "y = torch.where(weights[..., None] > 0.1, y, 0)",
}
"""Lines in a graph: `y` [T, K, H]."""
_BUILD = ("shares an expert", "shares a parameter", "hooks an expert", "has one other expert")
"""What is done to a block whose source has nothing special."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """What one block is made of."""

    style: str
    score: str
    """softmax, sigmoid"""
    choice: str
    """topk, biased, groups, after, argmax, max, unsorted"""
    renormalise: str
    """none, sum, epsilon"""
    scale: float
    weighted: bool
    wide_router: bool
    """Scores are computed in float32."""
    experts: int
    active: int
    expert: str
    """glu, merged, plain"""
    activation: str
    bias: bool
    input_major: bool
    shared: str
    """none, plain, gated"""
    residual: bool
    returns_logits: bool
    batched: bool
    dtype: str
    distortion: str
    """Empty, or a key of the tables above."""
    seed: int

    @property
    def is_loop(self) -> bool:
        """Tell whether experts are called from Python."""
        return self.style not in GRAPH_STYLES


def distortions(style: str) -> tuple[str, ...]:
    """List what can be wrong with a style."""
    places = [*_BEFORE, *_AFTER]
    if style in MODULE_STYLES:
        places += [*_TERM, *_BUILD]
    elif style in STACKED_STYLES:
        places += _TERM
    elif "{term}" in BODIES[style]:
        places += _TERMS
    return tuple(places)


def sentence(choose: Callable[[Sequence[Any]], Any], style: str, distorted: bool) -> Sentence:
    """Make a sentence; `choose` picks one of a sequence."""
    choices = ("topk", "biased", "groups", "after", "unsorted", "argmax", "max")
    choice = choose(choices)
    experts = choose((4, 6))
    modules = style in MODULE_STYLES
    dtype = choose(PAIRS.get(style, ("float32", "float32", "bfloat16")))
    kinds = ("merged", "plain") if style in ("grouped", "bmm") else ("glu", "merged", "plain")
    return Sentence(
        style=style,
        score=choose(("softmax", "sigmoid")),
        choice=choice,
        renormalise=choose(("none", "sum", "epsilon")),
        scale=choose((1.0, 2.5)),
        weighted=choose((True, True, True, False)),
        wide_router=choose((True, False)),
        experts=experts,
        active=1 if choice in ("argmax", "max") else choose((2, 2, 1, 3) if experts == 6 else (2,)),
        expert=choose(kinds),
        activation=choose(("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped")),
        bias=modules and choose((False, False, True)),
        input_major=not modules and choose((False, True)),
        shared=choose(("none", "none", "plain", "gated")),
        residual=choose((False, True)),
        returns_logits=choose((False, True)),
        batched=choose((False, True)),
        dtype=dtype,
        distortion=choose(distortions(style)) if distorted else "",
        seed=choose(range(100)),
    )


def source(told: Sentence) -> str:
    """Write the block's module."""
    after = _AFTER.get(told.distortion, "").format(weight=_some_weight(told))
    term = _TERM if told.is_loop else _TERMS
    places = {
        "term": term.get(told.distortion, ""),
        "act": act(told.expert, told.activation),
    }
    body = BODIES[told.style]
    if told.style not in MODULE_STYLES:
        places["first"] = first(told.style, told.expert, told.input_major)
        places["second"] = second(told.style, told.input_major)
    for name, text in places.items():
        body = _put(body, name, text)
    return _MODULE.format(
        expert=_expert(told),
        parameters=_indent(_parameters(told), 2),
        route=_indent(_route(told), 2),
        before=_BEFORE.get(told.distortion, ""),
        after=after,
        total=_indent(body, 2),
        extras=_indent(_extras(told), 2),
        E=told.experts,
    )


def build(told: Sentence) -> nn.Module:
    """Make the block, in eval mode, its weights drawn from its seed."""
    text = source(told)
    name = f"<block {next(_numbers)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "tests.grammar_block"}
    torch.manual_seed(told.seed)
    exec(compile(text, name, "exec"), names)
    model: nn.Module = names["Block"]().to(getattr(torch, told.dtype)).eval()
    if told.distortion in _BUILD:
        _distort(model, told.distortion)
    return model


_numbers = itertools.count()


def _distort(model: Any, how: str) -> None:
    one, other, *_ = model.experts.children()
    if how == "shares an expert":
        setattr(model.experts, [*model.experts._modules][1], one)
    elif how == "shares a parameter":
        other.down.weight = one.down.weight
    elif how == "hooks an expert":
        other.register_forward_hook(lambda _module, _args, out: out * 2)
    else:
        other._limit = 0.25


def _put(text: str, name: str, what: str) -> str:
    """Replace `{name}`, by several lines if need be; a line that becomes empty goes."""
    lines: list[str] = []
    for line in text.splitlines():
        margin = line[: len(line) - len(line.lstrip())]
        lines += line.replace(f"{{{name}}}", what.replace("\n", f"\n{margin}")).splitlines()
    return "\n".join(line for line in lines if line.strip())


def _indent(text: str, levels: int) -> str:
    return textwrap.indent(textwrap.dedent(text).strip("\n"), "    " * levels).lstrip()


def _some_weight(told: Sentence) -> str:
    return (
        "[*self.experts.children()][0].down.weight" if told.style in MODULE_STYLES else "self.w_out"
    )


_MODULE = """
import torch
import torch.nn.functional as F
from torch import nn


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self._limit = 1.5
{expert}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = {E}
        self.score = nn.Linear(16, {E}, bias=False)
        self.register_buffer("load", torch.zeros({E}, dtype=torch.int64))
        {parameters}

    def route(self, x):
        {route}
        return weights, ids, logits

    def total(self, x, weights, ids):
        {total}
        return out

    def forward(self, inputs):
        x = inputs.reshape(-1, 16)
        weights, ids, logits = self.route(x)
        {before}
        out = self.total(x, weights, ids)
        {after}
        {extras}
"""


def _expert(told: Sentence) -> str:
    glu = "self.gate = nn.Linear(16, 8, bias={b})\nself.up = nn.Linear(16, 8, bias={b})"
    first = {"glu": glu, "merged": "self.wide = nn.Linear(16, 16, bias={b})"}
    first["plain"] = "self.up = nn.Linear(16, 8, bias={b})"
    read = {
        "glu": "gate, up = self.gate(x), self.up(x)",
        "merged": "gate, up = self.wide(x).chunk(2, dim=-1)",
        "plain": "gate = self.up(x)",
    }
    made = f"{first[told.expert]}\nself.down = nn.Linear(8, 16, bias={{b}})".format(b=told.bias)
    activation = act(told.expert, told.activation).replace("1.5", "self._limit")
    body = f"{read[told.expert]}\nreturn self.down({activation})"
    return (
        textwrap.indent(made, "        ")
        + "\n\n    def forward(self, x):\n"
        + textwrap.indent(body, "        ")
    )


def _parameters(told: Sentence) -> str:
    count = told.experts
    if told.style in MODULE_STYLES:
        if told.style == "module_dict":
            made = f'nn.ModuleDict({{f"expert_{{i}}": Expert() for i in range({count})}})'
            return f"self.experts = {made}\n{_shared(told)}"
        return f"self.experts = nn.ModuleList([Expert() for _ in range({count})])\n{_shared(told)}"
    rows = INNER * 2 if told.expert == "merged" else INNER

    def made(name: str, outputs: int, inputs: int) -> str:
        sizes = (inputs, outputs) if told.input_major else (outputs, inputs)
        return f"self.{name} = nn.Parameter(torch.randn({count}, {sizes[0]}, {sizes[1]}) / 4)"

    lines = [made("w_in", rows, HIDDEN), made("w_out", HIDDEN, INNER)]
    if told.expert == "glu":
        lines.append(made("w_up", rows, HIDDEN))
    return "\n".join([*lines, _shared(told)])


def _shared(told: Sentence) -> str:
    bias = "self.shift = nn.Parameter(torch.randn(self.count) / 8)"
    lines = [bias] if told.choice == "biased" else []
    if told.shared != "none":
        lines.append("self.shared = nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 16))")
    if told.shared == "gated":
        lines.append("self.shared_gate = nn.Linear(16, 1, bias=False)")
    return "\n".join(lines)


def _route(told: Sentence) -> str:
    of = {"softmax": "softmax(-1)", "sigmoid": "sigmoid()"}[told.score]
    k, e = told.active, told.experts
    lines = ["logits = self.score(x)" + (".float()" if told.wide_router else "")]
    if told.choice != "after":
        lines.append(f"scores = logits.{of}")
    lines += {
        "topk": [f"weights, ids = scores.topk({k}, dim=-1)"],
        "unsorted": [f"weights, ids = torch.topk(scores, k={k}, dim=-1, sorted=False)"],
        "after": [f"weights, ids = logits.topk({k}, dim=-1)", f"weights = weights.{of}"],
        "biased": [
            f"ids = (scores + self.shift).topk({k}, dim=-1).indices",
            "weights = scores.gather(-1, ids)",
        ],
        "groups": [
            f"best = scores.view(-1, 2, {e // 2}).topk(2, dim=-1).values.sum(-1)",
            "chosen = best.topk(1, dim=-1).indices",
            "groups = torch.zeros_like(best).scatter_(1, chosen, 1)",
            f"mask = groups.unsqueeze(-1).expand(-1, 2, {e // 2}).reshape(-1, {e})",
            f"ids = scores.masked_fill(~mask.bool(), 0.0).topk({k}, dim=-1).indices",
            "weights = scores.gather(1, ids)",
        ],
        "argmax": ["ids = scores.argmax(-1, keepdim=True)", "weights = scores.gather(-1, ids)"],
        "max": ["weights, ids = scores.max(-1, keepdim=True)"],
    }[told.choice]
    if told.renormalise != "none":
        epsilon = " + 1e-20" if told.renormalise == "epsilon" else ""
        lines.append(f"weights = weights / (weights.sum(-1, keepdim=True){epsilon})")
    if told.scale != 1:
        lines.append(f"weights = weights * {told.scale}")
    if not told.weighted:
        lines.append("weights = torch.ones_like(weights)")
    return "\n".join([*lines, "weights = weights.to(x.dtype)"])


def _extras(told: Sentence) -> str:
    gate = "torch.sigmoid(self.shared_gate(x)) * " if told.shared == "gated" else ""
    lines = [f"out = out + {gate}self.shared(x)"] if told.shared != "none" else []
    lines.append("out = out.view(inputs.shape)")
    if told.residual:
        lines.append("out = inputs + out")
    lines.append("return out, logits" if told.returns_logits else "return out")
    return "\n".join(lines)

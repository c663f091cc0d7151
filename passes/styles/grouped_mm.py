"""Recognise tokens sorted by expert and multiplied group by group (transformers' `grouped_mm`).

ids_sorted, order = torch.sort(ids.reshape(-1))
offsets = histc(ids_sorted.float(), ...).cumsum(0)
rows    = grouped_mm(hidden[order // K], gate_up.transpose(-2, -1), offs=offsets)
terms   = grouped_mm(act(rows), down.transpose(-2, -1), offs=offsets)
terms   = terms * weights.reshape(-1)[order].unsqueeze(-1)
inverse = torch.empty_like(order); inverse[order] = torch.arange(...)
out     = terms[inverse].view(T, K, H).sum(dim=1)
"""

from moecc.passes.pattern import ANY, Either, Mutated, bind, call, cast, either
from moecc.passes.styles.style import Style, flat

_SORTED = bind("sorted", call("sort", flat(bind("ids"))))
_IDS = call("getitem", _SORTED, 0)
_ORDER = call("getitem", _SORTED, 1)
_OFFSETS = call("cumsum", call("histc", cast(_IDS), bins=bind("bins"), min=0, max=bind("last")))


def _product(rows: object, weight: str) -> Either:
    """Match one grouped product, with or without a bias added in place."""
    matrix = either(
        call("transpose", bind(weight), -2, -1),
        bind(f"{weight}_input_major", bind(weight)),
    )
    plain = call("grouped_mm|_grouped_mm|grouped_mm_fallback", cast(rows), matrix, offs=_OFFSETS)
    bias = call("getitem", bind(f"{weight}_bias"), _IDS)
    return either(Mutated(plain, call("add_", ANY, bias)), plain)


_INVERSE = Mutated(call("empty_like", _ORDER), call("setitem", ANY, _ORDER, call("arange")))
_WEIGHTED = call(
    "mul",
    _product(bind("activated"), "down"),
    call("unsqueeze", call("getitem", flat(bind("weights")), _ORDER), -1),
)

STYLE = Style(
    name="grouped_mm",
    anchor="sum",
    output=call(
        "sum", bind("terms", call("view|reshape", call("getitem", _WEIGHTED, _INVERSE))), dim=1
    ),
    first=_product(
        call("getitem", bind("hidden"), call("floordiv", _ORDER, bind("active"))), "gate_up"
    ),
    near=4,
)

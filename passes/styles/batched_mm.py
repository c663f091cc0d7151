"""Recognise a gathered copy of the weights for every (token, expert) pair (`batched_mm`).

ids   = ids.reshape(-1)
rows  = torch.bmm(gate_up[ids], hidden.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
terms = torch.bmm(down[ids], act(rows).unsqueeze(-1)).squeeze(-1)
out   = (terms * weights.reshape(-1).unsqueeze(-1)).view(T, K, H).sum(dim=1)
"""

from moecc.passes.pattern import ANY, Either, Mutated, bind, call, either
from moecc.passes.styles.style import Style, flat

_IDS = flat(bind("ids"))


def _product(rows: object, weight: str) -> Either:
    """Match one batched product: weights from the left, or from the right when input-major."""
    chosen = call("getitem", bind(weight), _IDS)
    left = call("squeeze", call("bmm", chosen, call("unsqueeze", rows, -1)), -1)
    right = call(
        "squeeze",
        bind(f"{weight}_input_major", call("bmm", call("unsqueeze", rows, 1), chosen)),
        1,
    )
    plain = either(left, right)
    bias = call("getitem", bind(f"{weight}_bias"), _IDS)
    return either(Mutated(plain, call("add_", ANY, bias)), plain)


_WEIGHTED = call(
    "mul", _product(bind("activated"), "down"), call("unsqueeze", flat(bind("weights")), -1)
)

STYLE = Style(
    name="batched_mm",
    anchor="sum",
    output=call(
        "sum",
        bind("terms", call("view|reshape", _WEIGHTED)),
        dim=1,
    ),
    first=_product(call("repeat_interleave", bind("hidden"), bind("active"), dim=0), "gate_up"),
    near=4,
)

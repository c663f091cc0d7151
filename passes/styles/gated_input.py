"""Recognise all experts computed for tokens that are scaled to zero where they are not chosen.

values, ids = logits.topk(K, 1)                                       Llama 4
gates  = full_like(logits, -inf).scatter_(1, ids, values).sigmoid()
rows   = x.repeat(E, 1) * gates.transpose(0, 1).reshape(-1, 1)
y      = bmm(act(bmm(rows.view(E, -1, H), gate_up)), down).view(-1, H)
out    = y.reshape(E, -1, H).sum(0)

Experts may have no bias, and their activation has to make zero of zero: what is not chosen adds
nothing only then.
"""

from moecc.passes.styles.style import ProductStyle

STYLE = ProductStyle(
    name="gated_input",
    anchors=frozenset({"einsum", "matmul", "bmm", "sum"}),
    chooses="gates",
    weighs=frozenset({"input"}),
)

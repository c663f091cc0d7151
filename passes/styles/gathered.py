"""Recognise matrices that are gathered for every choice of a token (gpt-fast).

w1, w3, w2 = w1[ids], w3[ids], w2[ids]                                [T, K, I, H] or [T, K, H, I]
x1  = silu(einsum("ti,taoi->tao", x, w1))
x3  = einsum("ti,taoi->tao", x, w3)
y   = einsum("tao,taio->tai", x1 * x3, w2)
out = einsum("tai,ta->ti", y, weights)

Letters and orders are free, and `@`, `bmm` or `mul` and `sum` do as well as `einsum`. Gate and up
may be halves of one tensor, before or after it is gathered. Weights may be multiplied in anywhere:
with a token, with its activated rows or with an expert's output.
"""

from moecc.passes.styles.style import ProductStyle

STYLE = ProductStyle(
    name="gathered",
    anchors=frozenset({"einsum", "matmul", "bmm", "mul", "sum"}),
    chooses="index",
    weighs=frozenset({"output", "input"}),
)

"""Recognise all experts computed for all tokens, and weighted by gates that are mostly zero.

w, ids = probabilities.topk(K, -1)
gates  = zeros_like(probabilities).scatter(-1, ids, w)
rows   = einsum("bsh,ehf->bsef", x, gate_up)
y      = einsum("bsef,efh->bseh", act(rows), down)
out    = (y * gates.unsqueeze(-1)).sum(2)

The gates have to be zero but for a token's top-k for a reason that the graph shows (`gates`), and
then only K experts are computed. A NaN or an infinity in an expert that a token did not choose
reaches the model's sum (0 * inf), and not this one: weights are taken to be finite.
"""

from moecc.passes.styles.style import ProductStyle

STYLE = ProductStyle(
    name="dense_gates",
    anchors=frozenset({"einsum", "matmul", "bmm", "mul", "sum"}),
    chooses="gates",
    weighs=frozenset({"output"}),
)

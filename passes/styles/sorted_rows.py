"""Recognise rows sorted by expert and multiplied group by group (torchtitan).

counts  = histc(ids.view(-1), bins=E, min=0, max=E)
order   = argsort(ids.view(-1), stable=True)
rows    = x[order // K] * weights.view(-1)[order, None]               or weights on the output
offsets = cumsum(counts, 0, dtype=int32)
act     = silu(_grouped_mm(rows, w1.transpose(-2, -1), offs=offsets))
act     = act * _grouped_mm(rows, w3.transpose(-2, -1), offs=offsets)
y       = _grouped_mm(act, w2.transpose(-2, -1), offs=offsets)
out     = shared.scatter_add(0, (order // K).reshape(-1, 1).expand(-1, H), y)

Rows may be brought back by `scatter_add` or `index_add`, into zeros or onto something else, or be
put where they were and summed over K.
"""

from moecc.passes.styles.style import ProductStyle

STYLE = ProductStyle(
    name="sorted_rows",
    anchors=frozenset(
        {
            "bmm", "einsum", "index_add", "index_add_", "matmul", "mul", "scatter_add",
            "scatter_add_", "sum",
        }
    ),
    chooses="groups",
    weighs=frozenset({"output", "input"}),
)  # fmt: skip

"""Recognise tokens that are dispatched to buffers of limited capacity (GShard, Switch, DeepSpeed).

mask     = one_hot(ids, E)
position = cumsum(mask, 0) - 1
mask     = mask * (position < capacity)                            tokens beyond are dropped
combine  = einsum("te,tc->tec", gates * mask, one_hot((position * mask).sum(-1), capacity))
slots    = einsum("tec,th->ech", combine.bool(), hidden)
rows     = bmm(slots, gate_up)
terms    = bmm(act(rows), down)
out      = einsum("tec,ech->th", combine, terms)

If no slot is shared, its expert sees just one token, and out[t] is the sum over the model's own ids
of combine[t, ids[t], :].sum() times the expert's output; a choice that is dropped is one whose
weight is zero. That slots are not shared is proven from the graph (`passes/capacity`). A NaN or an
infinity in one token reaches all of them in the dispatch product, and only that token here.
"""

from moecc.passes.styles.style import DispatchStyle

STYLE = DispatchStyle(name="capacity", anchors=frozenset({"einsum", "matmul", "bmm", "mm"}))

"""Describe as data how each block's router computes `ids` and `weights`; routers are not rewritten.

`description` has the vocabulary, `read` puts a description together. Between them: `values` (what a
node holds when it is read), `chain` (a value back to its scores), `factors` (what scores are
multiplied with or divided by), `choice` and `groups` (how experts are chosen), `inputs` (what the
router's matrix reads), `sparsemixer` and `sinkhorn` (two routers of their own kind).
"""

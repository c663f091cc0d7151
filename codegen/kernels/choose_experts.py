"""Choose each token's experts from logits[T, E]: ids[T, K] and their weights[T, K].

Scores, bias, groups, top-k, weights: one launch where torch has one or more for each. A program
takes a few tokens, a row of scores in the registers of a warp, and picks the best K times.

Scores are compared as integers of the same order, with NaN above everything as in torch.topk. Of
equal scores the expert of the lowest id is chosen; torch.topk promises no order among them.
"""

import triton
import triton.language as tl

from moecc.codegen.kernels import elementwise

LEAST: tl.constexpr = tl.constexpr(-0x80000000)
"""Below the key of every number."""


@triton.jit
def key_of(x):
    """Turn float32 into int32 of the same order."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def first_best(keys, places, AXIS: tl.constexpr):
    """Mark the largest key along an axis, the first of equal ones."""
    best = tl.expand_dims(tl.max(keys, axis=AXIS), AXIS)
    first = tl.min(tl.where(keys == best, places, 0x7FFFFFFF), axis=AXIS)
    return places == tl.expand_dims(first, AXIS)


@triton.jit
def apply_function(x, there, NAME: tl.constexpr):
    """Apply one of `router_spec.FUNCTIONS` along rows; softmax runs over what is there."""
    if NAME == "softmax":
        x = tl.where(there, x, float("-inf"))
        x = tl.exp(x - tl.max(x, axis=1)[:, None])
        x = tl.div_rn(x, tl.broadcast_to(tl.sum(x, axis=1)[:, None], x.shape))
    elif NAME == "sigmoid":
        x = tl.sigmoid(x)
    elif NAME == "sqrt-softplus":
        x = tl.sqrt_rn(elementwise.softplus(x))
    return x


@triton.jit
def keep_groups(
    choice, there, KEPT: tl.constexpr, BEST: tl.constexpr, FILL: tl.constexpr, DTYPE: tl.constexpr
):
    """Fill the scores [ROWS, G, S] outside of the KEPT groups whose BEST have the largest sum."""
    keys = tl.where(there, key_of(choice), LEAST)
    place = tl.broadcast_to(tl.arange(0, choice.shape[2])[None, None, :], choice.shape)
    total = tl.zeros(choice.shape[:2], dtype=tl.float32)
    for _ in tl.static_range(BEST):
        hit = first_best(keys, place, 2)
        total += tl.sum(tl.where(hit, choice, 0.0), axis=2)
        keys = tl.where(hit, LEAST, keys)
    total = total.to(DTYPE).to(tl.float32)
    keys = tl.where(tl.max(there.to(tl.int32), axis=2) > 0, key_of(total), LEAST)
    group = tl.broadcast_to(tl.arange(0, choice.shape[1])[None, :], total.shape)
    kept = tl.zeros(total.shape, dtype=tl.int32)
    for _ in tl.static_range(KEPT):
        hit = first_best(keys, group, 1)
        kept = tl.where(hit, 1, kept)
        keys = tl.where(hit, LEAST, keys)
    return tl.where(kept[:, :, None] > 0, choice, FILL)


@triton.jit(do_not_specialize=["tokens"])
def choose_experts(
    logits_ptr,  # [T, E]
    bias_ptr,  # [E] or None
    ids_ptr,  # [T, K] int64, written
    weights_ptr,  # [T, K], written
    tokens,  # T
    EXPERTS: tl.constexpr,
    ACTIVE: tl.constexpr,  # K
    ROUTER: tl.constexpr,  # the RouterSpec
    DTYPE: tl.constexpr,  # what scores are rounded to
    ROWS: tl.constexpr,  # tokens of a program
    BLOCK_G: tl.constexpr,  # power of two >= groups
    BLOCK_S: tl.constexpr,  # power of two >= experts of a group
    CHOICES: tl.constexpr,  # power of two >= K
):
    """Choose for ROWS tokens."""
    BLOCK: tl.constexpr = BLOCK_G * BLOCK_S
    SIZE: tl.constexpr = EXPERTS // ROUTER.groups
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    group, place = lane // BLOCK_S, lane % BLOCK_S
    expert = group * SIZE + place
    there = (group < ROUTER.groups) & (place < SIZE)
    in_rows = (row < tokens)[:, None]

    at = row.to(tl.int64)[:, None] * EXPERTS + expert
    logits = tl.load(logits_ptr + at, mask=there & in_rows, other=0.0).to(tl.float32)
    scores = apply_function(logits, there, ROUTER.scores).to(DTYPE).to(tl.float32)
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert, mask=there, other=0.0).to(tl.float32)
        choice = choice.to(DTYPE).to(tl.float32)
    if ROUTER.kept < ROUTER.groups:
        shape: tl.constexpr = (ROWS, BLOCK_G, BLOCK_S)
        by_group, exist = tl.reshape(choice, shape), tl.reshape(there, shape)
        by_group = keep_groups(by_group, exist, ROUTER.kept, ROUTER.best, ROUTER.fill, DTYPE)
        choice = tl.reshape(by_group, (ROWS, BLOCK))

    keys = tl.where(there, key_of(choice), LEAST)
    k = tl.broadcast_to(tl.arange(0, CHOICES)[None, :], (ROWS, CHOICES))
    ids = tl.zeros((ROWS, CHOICES), dtype=tl.int32)
    weights = tl.zeros((ROWS, CHOICES), dtype=tl.float32)
    for i in range(ACTIVE):
        hit = first_best(keys, lane, 1)
        ids = tl.where(k == i, tl.sum(tl.where(hit, expert, 0), axis=1)[:, None], ids)
        weights = tl.where(k == i, tl.sum(tl.where(hit, scores, 0.0), axis=1)[:, None], weights)
        keys = tl.where(hit, LEAST, keys)

    in_k = k < ACTIVE
    weights = apply_function(weights, in_k, ROUTER.weigh)
    if ROUTER.normalised:
        total = tl.sum(tl.where(in_k, weights, 0.0), axis=1) + ROUTER.epsilon
        if ROUTER.floor > 0:
            total = elementwise.maximum(total, ROUTER.floor)
        weights = tl.div_rn(weights, tl.broadcast_to(total[:, None], weights.shape))
    weights *= ROUTER.scale
    at = row.to(tl.int64)[:, None] * ACTIVE + k
    tl.store(ids_ptr + at, ids.to(tl.int64), mask=in_k & in_rows)
    tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=in_k & in_rows)

"""Find a token's experts: which of them add something, in what order, and where their weights lie.

Sums over a token's experts have one order, ascending (and that of k among equals), whoever calls:
an expert is added at its place also when only some of them are in memory.
"""

import triton
import triton.language as tl


@triton.jit
def locate(slots_ptr, expert, valid):
    """Find where experts lie, and whether they are there; without slots all are, at their id."""
    slot = expert
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + expert, mask=valid, other=-1).to(expert.dtype)
        valid &= slot >= 0
    return slot, valid


@triton.jit
def load_choices(ids_ptr, slots_ptr, token, active, EXPERTS: tl.constexpr, CHOICES: tl.constexpr):
    """Load a token's choices as keys, expert * CHOICES + k, and count those that add something.

    The others, and what is beyond K, have the largest key that there is.
    """
    k = tl.arange(0, CHOICES)
    ids = tl.load(ids_ptr + token * active + k, mask=k < active, other=-1)
    valid = (ids >= 0) & (ids < EXPERTS)
    ids = tl.where(valid, ids, 0).to(tl.int32)
    _, valid = locate(slots_ptr, ids, valid)
    return tl.where(valid, ids * CHOICES + k, 0x7FFFFFFF), tl.sum(valid.to(tl.int32), axis=0)


@triton.jit
def next_choice(keys, last):
    """Return the smallest key after `last`."""
    return tl.min(tl.where(keys > last, keys, 0x7FFFFFFF), axis=0)

"""Swap expert weights for low-bit ones.

Needs: blocks.  Adds: each block's scheme.  Graph: unchanged; `lower` picks kernels by it.

Weights are packed when a block first runs, and the copies stay beside the model's own. A scheme
that no kernel of the device knows is a miss of `lower`, and the block keeps its dtype.
"""

from dataclasses import replace

from moecc.passes.ir import Miss, MoeBlock, Outcome, Program
from moecc.passes.options import Options


def quantize_experts(program: Program, options: Options) -> Outcome:
    """Give every block the scheme that the options have for its path."""
    if options.quantize is None:
        return Outcome(program=program, note="off: experts keep the model's dtype")
    blocks = tuple(replace(one, scheme=options.scheme(one.path)) for one in program.blocks)
    why = f"no pattern of quantize={options.quantize!r} matches; weights keep their dtype"
    misses = [Miss(where=one.path, why=why, fallback=True) for one in blocks if not one.scheme]
    changed = sum(one != other for one, other in zip(blocks, program.blocks, strict=True))
    saved = sum(one.weight_bytes - _low_bit_bytes(one) for one in blocks if one.scheme)
    note = f"{changed} blocks, {saved / 1e6:.1f} MB less to read" if changed else ""
    done = replace(program, blocks=blocks)
    return Outcome(program=done, rewrites=changed, misses=tuple(misses), note=note)


def _low_bit_bytes(block: MoeBlock) -> float:
    assert block.scheme is not None
    return block.weight_bytes / block.dtype.itemsize * block.scheme.bits_per_weight / 8

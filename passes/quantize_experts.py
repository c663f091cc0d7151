"""Swap expert weights for low-bit ones.

Needs: blocks.  Adds: each block's schemes.  Graph: unchanged; `lower` picks kernels by it.

Weights are packed when a block first runs, and the copies stay beside the model's own. A scheme
that no kernel of the device knows is a miss of `lower`, and the block keeps its dtype.
"""

from dataclasses import replace

from moecc.passes.ir import Miss, MoeBlock, Outcome, Program
from moecc.passes.options import Options


def quantize_experts(program: Program, options: Options) -> Outcome:
    """Give every block the schemes that the options have for its two products."""
    if options.quantize is None:
        return Outcome(program=program, note="off: experts keep the model's dtype")
    blocks = tuple(replace(one, schemes=options.schemes(one.path)) for one in program.blocks)
    misses = [
        Miss(where=one.path, why=_why_none(options, one.path), fallback=True)
        for one in blocks
        if not one.schemes
    ]
    changed = sum(one != other for one, other in zip(blocks, program.blocks, strict=True))
    saved = sum(one.weight_bytes - _low_bit_bytes(one) for one in blocks if one.schemes)
    note = f"{changed} blocks, {saved / 1e6:.1f} MB less to read" if changed else ""
    done = replace(program, blocks=blocks)
    return Outcome(program=done, rewrites=changed, misses=tuple(misses), note=note)


def _low_bit_bytes(block: MoeBlock) -> float:
    assert block.schemes is not None
    second = block.experts * block.hidden_size * block.intermediate
    first = block.weight_bytes // block.dtype.itemsize - second
    schemes = block.schemes
    bits = first * schemes.first.bits_per_weight + second * schemes.second.bits_per_weight
    return bits / 8


def _why_none(options: Options, path: str) -> str:
    matched = ", ".join(name for name, one in options.by_projection(path).items() if one)
    found = f"only {matched}" if matched else "nothing"
    return (
        f"the patterns of quantize={options.quantize!r} match {found} of it, and a block is "
        "quantized whole; weights keep their dtype"
    )

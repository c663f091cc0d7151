"""Swap expert weights for low-bit ones.

Needs: blocks.  Adds: nothing yet.  Graph: unchanged.

This version has no low-bit kernels: asked to quantize, the pass leaves every block as it is and
says so, which is an error with `strict=True`.
"""

from moecc.passes.ir import Miss, Outcome, Program
from moecc.passes.options import Options


def quantize_experts(program: Program, options: Options) -> Outcome:
    """Report each block that a wanted scheme leaves unquantized."""
    if options.quantize is None:
        return Outcome(program=program, note="off: experts keep the model's dtype")
    why = f"quantize={options.quantize!r} is not in this version; weights stay as they are"
    misses = tuple(Miss(where=block.path, why=why, fallback=True) for block in program.blocks)
    return Outcome(program=program, misses=misses)

"""Give each block the best kernel for its device.

Needs: blocks.  Adds: lowerings.  Graph: each `moecc.experts` names its kernel.

    moecc.experts(..., "torch: mul(silu(gate), up) bfloat16 E128 H2048 I768 cpu")
→
    moecc.experts(..., "native: mul(silu(gate), up) bfloat16 E128 H2048 I768 cpu")

With schemes the kernel reads low-bit copies of the weights: `native int8: ...`. An emitter that
declines is a miss with its reason, and the block keeps its dtype, or the torch kernel.
"""

from dataclasses import replace

from moecc.codegen.emit import choose, install_kernel
from moecc.passes.fuse_experts import kernel_spec
from moecc.passes.ir import Lowering, Miss, Outcome, Program
from moecc.passes.options import Options


def lower(program: Program, options: Options) -> Outcome:
    """Choose, install and name a kernel for every block."""
    nodes = program.nodes()
    misses: list[Miss] = []
    lowerings: list[Lowering] = []
    rewrites = 0
    for block in program.blocks:
        node = nodes[block.output]
        kernel, declined = choose(kernel_spec(block), options.kernels, block.schemes)
        misses += [Miss(where=block.path, why=why, fallback=True) for why in declined]
        install_kernel(kernel, options.kernels)
        rewrites += node.args[-1] != kernel.key
        node.update_arg(len(node.args) - 1, kernel.key)
        lowerings.append(Lowering(block=block.path, kernel=kernel.key, source=kernel.source))
    done = replace(program, lowerings=tuple(lowerings))
    return Outcome(program=done, rewrites=rewrites, misses=tuple(misses))

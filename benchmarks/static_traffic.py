"""Count what one MoE layer has to move and compute, launch by launch, ours and others'.

    launches(decomposition, shape, tokens)    bytes that a launch reads and writes, each place once

Routing is uniform: a token chooses K of E experts, all sets as likely as any. The minimum reads the
weights of the experts that are chosen and the hidden states once, and writes the output. All start
from ids and routing weights, and hold values between launches in bfloat16.

    vLLM            moe_align_block_size, fused_moe_kernel to [T*K, 2I], silu_and_mul,
                    fused_moe_kernel to [T*K, H], moe_sum
    triton_kernels  sum of the bitmatrix, memset, routing; matmul_ogs with swiglu to [T*K, I],
                    matmul_ogs to [T*K, H], reduction
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.codegen.triton_costs import expected_experts

HALF = 2
"""Bytes of a value."""
DECOMPOSITIONS = ("minimum", "moecc decode", "moecc grouped", "vLLM", "triton_kernels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel's part of a layer."""

    name: str
    bytes: float


def flops(shape: Mapping[str, int], tokens: int) -> int:
    """Count multiplications and additions of the three matrices."""
    return 6 * tokens * shape["active"] * shape["hidden"] * shape["intermediate"]


def launches(
    decomposition: str, shape: Mapping[str, int], tokens: int, bits: float = 16
) -> list[Launch]:
    """List the launches of a layer whose weights have so many bits, scales counted."""
    hidden, inner = shape["hidden"], shape["intermediate"]
    pairs = tokens * shape["active"]
    matrix = expected_experts(tokens, shape["active"], shape["experts"]) * hidden * inner * bits / 8
    states, rows, terms = (HALF * size for size in (tokens * hidden, pairs * inner, pairs * hidden))
    ids, order = 8 * pairs, 4 * pairs
    shares = 4 * pairs
    found = {
        "minimum": {"": states + ids + shares + 3 * matrix + states},
        "moecc decode": {
            "decode_gate_up": states + ids + 2 * matrix + rows,
            "decode_down": rows + ids + shares + matrix + states,
        },
        "moecc grouped": {
            "route": ids + order,
            "grouped_gate_up": states + order + 2 * matrix + rows,
            "grouped_down": rows + order + shares + matrix + terms,
            "reduce_terms": terms + ids + states,
        },
        "vLLM": {
            "moe_align_block_size": ids + order,
            "fused_moe_kernel": states + order + 2 * matrix + 2 * rows,
            "silu_and_mul": 2 * rows + rows,
            "fused_moe_kernel, down": rows + order + shares + matrix + terms,
            "moe_sum": terms + states,
        },
        "triton_kernels": {
            "sum_bitmatrix": tokens * shape["experts"] / 8,
            "memset": order,
            "routing": ids + 2 * order,
            "matmul_ogs": states + order + 2 * matrix + rows,
            "matmul_ogs, down": rows + order + shares + matrix + terms,
            "reduce": terms + states,
        },
    }[decomposition]
    return [Launch(name=name, bytes=size) for name, size in found.items()]

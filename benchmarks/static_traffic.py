"""Count what one MoE layer has to move and compute, launch by launch, ours and others'.

    launches(decomposition, shape, tokens)    bytes that a launch reads and writes, each place once

From the router's logits to the layer's output, to which a shared expert's is added if the shape has
one; its own products are dense layers everywhere. Routing is uniform: a token chooses K of E
experts, all sets as likely as any. The minimum reads logits, hidden states and the weights of the
experts that are chosen once, and writes the output. Values between launches are bfloat16; ids and
routing weights are int64 and float32 here, int32 and float32 in vLLM, int16 and bfloat16 in
triton_kernels.

    vLLM            topk_softmax, moe_align_block_size, fused_moe_kernel to [T*K, 2I],
                    silu_and_mul, fused_moe_kernel to [T*K, H], moe_sum; add
    triton_kernels  topk with a bitmatrix, sum of the bitmatrix, memset, routing; matmul_ogs with
                    swiglu to [T*K, I], matmul_ogs to [T*K, H], reduction; add
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.codegen.triton_costs import expected_experts

HALF = 2
"""Bytes of a value."""
DEEPSEEK_V3 = {"hidden": 7168, "intermediate": 2048, "experts": 256, "active": 8, "shared": 1}
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
    logits, order, bitmatrix = (
        HALF * tokens * shape["experts"],
        4 * pairs,
        tokens * shape["experts"] / 8,
    )
    ids, shares = 8 * pairs, 4 * pairs  # int64 and float32
    short = HALF * pairs
    shared = states if "shared" in shape else 0
    found = {
        "minimum": {"": logits + states + 3 * matrix + shared + states},
        "moecc decode": {
            "choose_experts": logits + ids + shares,
            "decode_gate_up": states + ids + 2 * matrix + rows,
            "decode_down": rows + ids + shares + matrix + shared + states,
        },
        "moecc grouped": {
            "choose_experts": logits + ids + shares,
            "route": ids + order,
            "grouped_gate_up": states + order + 2 * matrix + rows,
            "grouped_down": rows + order + shares + matrix + terms,
            "reduce_terms": terms + ids + shared + states,
        },
        "vLLM": {
            "topk_softmax": logits + shares + 2 * order,  # ids, and where they come from
            "moe_align_block_size": order + order,
            "fused_moe_kernel": states + order + 2 * matrix + 2 * rows,
            "silu_and_mul": 2 * rows + rows,
            "fused_moe_kernel, down": rows + order + shares + matrix + terms,
            "moe_sum": terms + states,
            "add": 3 * shared,
        },
        "triton_kernels": {
            "topk": logits + 2 * short + bitmatrix,
            "sum_bitmatrix": bitmatrix,
            "memset": order,
            "routing": short + 2 * order,
            "matmul_ogs": states + order + 2 * matrix + rows,
            "matmul_ogs, down": rows + order + short + matrix + terms,
            "reduce": terms + states,
            "add": 3 * shared,
        },
    }[decomposition]
    return [Launch(name=name, bytes=size) for name, size in found.items() if size]

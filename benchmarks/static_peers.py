"""Record what other kernels are under the same compilation, as figures.

Triton 3.7.1, bfloat16, no bias. vLLM: `fused_moe_kernel` of 0.33.0 (wheel), with strides
specialised as vLLM launches it; its tile computes gates or ups, ours both, so that tiles of as many
columns are beside one another. triton_kernels: `matmul_ogs` as vLLM 0.33.0 ships it, launched on a
dry-run driver. int4: `fused_moe_kernel_gptq_awq` at the tile that vLLM's Triton path takes by
default; its loop is counted for as many products as a step of ours.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One kernel of a peer, and the row of ours that does as much in a step."""

    name: str
    target: str
    weights: str
    ours: str
    registers: int
    shared: int | None
    loop: int
    """Instructions of the hot loop, for as many products as ours."""
    products: str
    """Tensor core instructions of the loop."""


_VLLM = {"target": "sm_90", "weights": "bf16"}
PEERS = (
    Peer(
        name="vLLM 64x128x64",
        ours="grouped_down 64x128x64",
        registers=122,
        shared=73728,
        loop=136,
        products="4 HGMMA",
        **_VLLM,
    ),
    Peer(
        name="vLLM 128x128x64",
        ours="grouped_down 128x128x64",
        registers=116,
        shared=98304,
        loop=114,
        products="4 HGMMA",
        **_VLLM,
    ),
    Peer(
        name="vLLM 16x64x128, 4 stages",
        ours="grouped_down 16x128x64 swapped",
        registers=72,
        shared=61440,
        loop=113,
        products="16 HMMA",
        **_VLLM,
    ),
    Peer(
        name="triton_kernels 16x256x64, split 2",
        ours="grouped_down 16x128x64 swapped",
        registers=134,
        shared=104448,
        loop=127,
        products="32 HMMA",
        **_VLLM,
    ),
    Peer(
        name="triton_kernels 128x256x64, persistent",
        ours="persistent_down 128x256x64",
        registers=184,
        shared=213016,
        loop=0,
        products="",
        **_VLLM,
    ),
    Peer(
        name="triton_kernels 128x256x64, persistent, swiglu",
        ours="persistent_gate_up 128x128x64",
        registers=254,
        shared=None,
        loop=0,
        products="",
        **_VLLM,
    ),
    Peer(
        name="triton_kernels persistent, warps specialized",
        target="sm_100",
        weights="bf16",
        ours="persistent_down 128x256x64",
        registers=168,
        shared=229732,
        loop=66,
        products="",
    ),
    *(
        Peer(
            name="vLLM int4 (groups of 128) 16x64x32",
            target=target,
            weights="int4",
            ours="grouped_down 16x128x64" + swapped,
            registers=56,
            shared=None,
            loop=828,
            products="",
        )
        for target, swapped in (("sm_80", ""), ("sm_90", " swapped"))
    ),
)

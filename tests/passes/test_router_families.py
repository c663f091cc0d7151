"""Routers and shared experts of transformers' families, as they are described."""

import re

import pytest
import torch

from moecc.passes.ir import MoeBlock
from moecc.records import all_records
from moecc.tiny import tiny_model

GROUPED = "sigmoid + bias → 1 of 2 groups (sum of top 2) → top-2"
SHARED = "gated silu MLP of 48"
_MLP = (
    "linear 32 → RMS norm → × learned scales → linear 32 → gelu → linear 32 → gelu → logits → "
    "softmax + bias → top-1 → class 8 is no expert"
)
FAMILIES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "aria": (("logits → top-2 → softmax",), SHARED),
    "beam": ((f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5 on the output",), None),
    "cohere2_moe": (("logits → top-2 → softmax",), f"{SHARED}, the sum ÷ 2"),
    "deepseek_v2": (("softmax → 1 of 2 groups (max, the rest 0) → top-2",), SHARED),
    "deepseek_v3": ((f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",), SHARED),
    "deepseek_v4": (
        (
            "sqrt-softplus → 2 from a table of 128 rows (hash routing) → ÷ (sum + 1e-20) → × 1.5",
            "sqrt-softplus + bias → top-2 → ÷ (sum + 1e-20) → × 1.5",
        ),
        SHARED,
    ),
    "dots1": ((GROUPED,), SHARED),
    "ernie4_5_moe": (("softmax + bias → top-2 → ÷ max(sum, 1e-12)",), SHARED),
    "flint": (("sigmoid → top-2 → ÷ sum",), SHARED),
    "gemma4": (
        (
            "earlier hidden state → RMS norm → × learned scales → × 0.125 → logits → softmax → "
            "top-2 → ÷ sum → × learned scale of the expert",
        ),
        None,
    ),
    "hy_v3": (("sigmoid + bias → top-2 → ÷ (sum + 1e-20) → × 2.826",), SHARED),
    "inkling": (
        (
            "sigmoid → first 8 of 10 + bias → top-2 → weights from first 8 of 10 → with 2 unchosen "
            "beside → log_sigmoid → softmax → × 8 → × learned scale → first 2 of 4",
        ),
        "unknown: sum_1",
    ),
    "kolibri1": (("logits + bias → top-2 → sigmoid",), SHARED),
    "lfm2_moe": (("sigmoid + bias → top-2 → ÷ (sum + 1e-06)",), None),
    "minimax_m3_vl": (
        ("sigmoid + bias → top-2 → ÷ sum → × 2 on the output",),
        "gated sigmoid MLP of 48",
    ),
    "mistral4": (
        ("softmax → 1 of 2 groups (sum of top 2, the rest 0) → top-2 → ÷ (sum + 1e-20)",),
        SHARED,
    ),
    "mixtral": (("softmax → top-2 → ÷ sum",), None),
    "muse_spark": (
        (
            "earlier hidden state → logits → × 0.176777 → sigmoid + bias → top-2 → "
            "÷ (sum + 1e-15) → on what becomes of each output",
        ),
        None,
    ),
    "nemotron_h": ((f"{GROUPED} → ÷ (sum + 1e-20)",), "relu → square MLP of 48"),
    "olmoe": (("softmax → top-2",), None),
    "openai_privacy_filter": (("logits → top-2 → softmax → ÷ 2 → × 2 on the output",), None),
    "phimoe": (("logits → sparsemixer top-2 (softmax of logits within 0.02)",), None),
    "qwen2_moe": (("softmax → top-2",), f"{SHARED} × sigmoid gate"),
    "zaya": ((_MLP, f"unknown: router_hidden_states_2 → {_MLP.partition(' → ')[2]}"), None),
}
"""Family → what its router and its shared expert are in words; lines of the model are left out."""
ALIKE = {
    "afmoe": "sigmoid + bias → top-2 → ÷ (sum + 1e-20)",
    "axk1": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "axk2": "sigmoid + bias → top-2 → ÷ (sum + 1e-20) → × 2.5",
    "bailing_hybrid": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "dbrx": "softmax → top-2 → ÷ sum",
    "deepseek_ocr2": "softmax → top-2",
    "deepseek_v32": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "dots3_note": f"{GROUPED} → ÷ (sum + 1e-20)",
    "ernie4_5_vl_moe": "softmax + bias → top-2 → ÷ max(sum, 1e-12)",
    "exaone_moe": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "flex_olmo": "softmax → top-2",
    "glm4_moe": f"{GROUPED} → ÷ (sum + 1e-20)",
    "glm4_moe_lite": f"{GROUPED} → ÷ (sum + 1e-20) → × 1.8",
    "glm4v_moe": f"{GROUPED} → ÷ (sum + 1e-20)",
    "glm5_next": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "glm_moe_dsa": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.5",
    "gpt_oss": "logits → top-2 → softmax",
    "granitemoe": "logits → top-2 → softmax",
    "granitemoe_swa": "logits → top-2 → softmax",
    "granitemoehybrid": "logits → top-2 → softmax",
    "granitemoeshared": "logits → top-2 → softmax",
    "hunyuan_v1_moe": "softmax → top-2 → ÷ sum",
    "hy_v4": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.827",
    "inkling2": "sigmoid + bias → top-2 → ÷ (sum + 1e-20) → × 8",
    "jamba": "softmax → top-2",
    "jetmoe": "logits → top-2 → softmax",
    "kimi_linear": f"{GROUPED} → ÷ (sum + 1e-20) → × 2.446",
    "laguna": "sigmoid + bias → top-2 → ÷ sum",
    "llama4": "logits → top-1 → sigmoid → on the input",
    "longcat_flash": "softmax + bias → top-2 → × 6",
    "mellum": "softmax → top-2 → ÷ sum",
    "mimo_v2_flash": f"{GROUPED} → ÷ (sum + 1e-20)",
    "minimax": "softmax → top-2 → ÷ sum",
    "minimax_m2": "sigmoid + bias → top-2 → ÷ sum",
    "mistral_large4": FAMILIES["mistral4"][0][0],
    "qwen3_5_moe": "softmax → top-2 → ÷ sum",
    "qwen3_moe": "softmax → top-2 → ÷ sum",
    "qwen3_next": "softmax → top-2 → ÷ sum",
    "qwen3_omni_moe": "softmax → top-2 → ÷ sum",
    "qwen3_vl_moe": "softmax → top-2 → ÷ sum",
    "qwen4_exp": "softmax → top-2 → ÷ sum",
    "solar_open": f"{GROUPED} → ÷ (sum + 1e-20)",
    "switch_transformers": "softmax → top-1 → capacity (place ≤ 64)",
    "unlimited_ocr": "softmax → top-2",
}
"""Families whose router is like another's."""


def blocks_of_family(family: str, **changes: object) -> list[MoeBlock]:
    """Compile a tiny instance as a user does; give its blocks."""
    model = tiny_model(family, **changes)
    ids = {"input_ids": torch.randint(3, 99, (2, 16))}
    if getattr(model.config, "is_encoder_decoder", False):
        ids["decoder_input_ids"] = ids["input_ids"]
    before = len(all_records())
    options = {"inner": "eager", "kernels": "torch"}
    with torch.no_grad():
        torch.compile(model, backend="moecc", options=options)(**ids)
    return [block for record in all_records()[before:] for block in record.blocks]


def without_lines(text: str) -> str:
    return re.sub(r" \(modeling_\w+\.py:\d+\)", "", text)


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_the_router_and_the_shared_expert_of_a_family(family: str) -> None:
    pytest.importorskip("transformers")
    routers, shared = FAMILIES[family]
    blocks = blocks_of_family(family)
    assert tuple(dict.fromkeys(without_lines(str(one.router)) for one in blocks)) == routers
    found = {without_lines(str(one.shared)) if one.shared else None for one in blocks}
    assert found == {shared}


@pytest.mark.slow
@pytest.mark.parametrize("family", ALIKE)
def test_reads_the_router_of_every_family(family: str) -> None:
    assert {str(one.router) for one in blocks_of_family(family)} == {ALIKE[family]}


def test_reads_a_soft_cap_that_a_family_can_be_given() -> None:
    pytest.importorskip("transformers")
    blocks = blocks_of_family("laguna", moe_router_logit_softcapping=30.0)
    assert {str(one.router) for one in blocks} == {
        "logits → soft cap 30 → sigmoid + bias → top-2 → ÷ sum"
    }

"""Hold the settings that make each MoE family of transformers tiny: pure data for `moecc.tiny`.

Families are named here, for tests, demos and the coverage harness, and nowhere else: detection
knows structures only.
"""

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 1e4}

SIZES: dict[str, Any] = {
    # the transformer
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "sliding_window": 64, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "image_token_id": 100, "image_token_index": 100,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16,
    "num_mtp_layers": 0, "num_nextn_predict_layers": 0,
    # the experts
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
    "shared_experts_intermediate_size": 48, "shared_intermediate_size": 48, "share_expert_dim": 48,
    "expert_ffn_hidden_size": 48, "ffn_hidden_size": 48, "enable_moe_block": True,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "first_k_dense_replace": 0, "num_dense_layers": 0,
    "moe_layer_start_index": 0, "router_hidden_size": 32,
    # limits that activations of this size reach, so that a clamp can be seen to work
    "swiglu_limit": 0.2, "mlp_gate_softcap": 0.2, "mlp_up_softcap": 0.3,
    # latent, sparse and linear attention, state spaces
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2,
    "linear_num_heads": 4, "linear_head_dim": 16, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "gated_norm_rank": 4, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}  # fmt: skip
"""Small sizes, by the names that configurations use for them; each takes those that it has."""

_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
"""Latent attention: a head per query head, and rotary embedding on qk_rope_head_dim alone."""
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_STREAMS = {"hc_mult": 2, "hc_sinkhorn_iters": 3}
"""Several residual streams."""
_RELATIVE = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "sliding_window_size": 16, "d_rel": 4, "rel_extent": 32,
}  # fmt: skip
_THREE_AXES = {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1": _LATENT | _DENSE_THEN_SPARSE,
    "axk2": _LATENT | _DENSE_THEN_SPARSE | {"n_group": None, "topk_group": None},
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_group_size": 2},
    "beam": _DENSE_THEN_SPARSE,
    "cohere2_moe": _SPARSE,
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "deepseek_ocr2": _SPARSE | {"num_key_value_heads": 4, "n_group": None, "topk_group": None},
    "deepseek_v2": _LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT | {"first_k_dense_replace": 1, "num_hidden_layers": 3},
    "deepseek_v32": _LATENT | _SPARSE,
    "deepseek_v4": _STREAMS | {
        "num_key_value_heads": 1, "head_dim": 32, "o_groups": 2, "o_lora_rank": 16,
        "mlp_layer_types": ["hash_moe", "moe"], "index_topk": 4, "sliding_window": 16,
    },
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "dots1": {"num_key_value_heads": 4},
    "dots3_note": _SPARSE | {"num_key_value_heads": 4},
    "ernie4_5_vl_moe": _SPARSE | _THREE_AXES | {"moe_intermediate_size": [48, 32]},
    "exaone_moe": _SPARSE,
    "flint": {"mlp_only_layers": []},
    "glm4_moe_lite": _DENSE_THEN_SPARSE | {"num_key_value_heads": 4},
    "glm4v_moe": {
        "rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    },
    "glm5_next": _SPARSE | _STREAMS | _LINEAR_THEN_FULL | {
        "num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 2
    },
    "glm_moe_dsa": _LATENT | _SPARSE,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_expand": 2},
    "hy_v3": _DENSE_THEN_SPARSE,
    "hy_v4": _DENSE_THEN_SPARSE | {"num_key_value_heads": 4, "hc_mult": 2},
    "inkling": _RELATIVE | _DENSE_THEN_SPARSE | {"n_shared_experts": 2},
    "inkling2": _RELATIVE | {"unpadded_vocab_size": 120, "n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "jetmoe": {"kv_channels": 16},
    "kimi_linear": _DENSE_THEN_SPARSE | _LINEAR_THEN_FULL | {
        "num_key_value_heads": 4, "q_lora_rank": None
    },
    "laguna": _DENSE_THEN_SPARSE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"intermediate_size_mlp": 96, "attention_chunk_size": 64, "num_experts_per_tok": 1},
    "longcat_flash": {
        "num_layers": 2, "num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 8,
        "zero_expert_num": 2,
    },
    "mimo_v2_flash": _DENSE_THEN_SPARSE,
    "minimax": {"block_size": 16},
    "mistral4": {"num_key_value_heads": 4},
    "mistral_large4": {"num_key_value_heads": 4},
    "muse_spark": {"moe_hidden_size": 32},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4,
        "moe_shared_expert_intermediate_size": 48, "mamba_num_heads": 8, "mamba_head_dim": 16,
        "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
    },
    "nllb_moe": {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_sparse_step": 2, "decoder_sparse_step": 2,
    },
    "qwen3_5_moe": _LINEAR_THEN_FULL,
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": _LINEAR_THEN_FULL,
    "qwen3_omni_moe": _THREE_AXES,
    "qwen3_vl_moe": _THREE_AXES,
    "qwen4_exp": _LINEAR_THEN_FULL | {
        "hc_count": 2, "hc_lowrank": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "step3p7": _SPARSE | {"swiglu_limits": [0.1, None], "swiglu_limits_shared": [None, 0.1]},
    "switch_transformers": {
        "d_model": 64, "d_kv": 16, "d_ff": 48, "num_heads": 4, "num_layers": 2,
        "num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1,
    },
    "unlimited_ocr": _SPARSE | {"num_key_value_heads": 4, "n_group": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Settings that a family needs beyond small sizes."""

MODEL_TYPES: dict[str, str] = {
    "inkling": "inkling_text",
    "nllb_moe": "nllb-moe",
    "qwen3_omni_moe": "qwen3_omni_moe_text",
}
"""Families whose folder in transformers is not the model type to instantiate."""

CLASSES: dict[str, str] = {
    "deepseek_ocr2": "DeepseekOcr2TextModel",
    "diffusion_gemma": "DiffusionGemmaEncoderTextModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeTextModel",
    "mistral4": "Mistral4ForCausalLM",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel",
    "step3p7": "Step3p7TextModel",
    "unlimited_ocr": "UnlimitedOcrTextModel",
}
"""Model classes that transformers' Auto classes do not know."""

FAMILIES: tuple[str, ...] = (
    "afmoe", "aria", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx",
    "deepseek_ocr2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffusion_gemma",
    "doge", "dots1", "dots3_note", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "flex_olmo",
    "flint", "gemma4", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa",
    "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling", "inkling2", "jamba", "jetmoe", "kimi_linear",
    "kolibri1", "laguna", "lfm2_moe", "llama4", "longcat_flash", "mellum", "mimo_v2_flash",
    "minimax", "minimax_m2", "minimax_m3_vl", "mistral4", "mistral_large4", "mixtral", "muse_spark",
    "nemotron_h", "nllb_moe", "olmoe", "openai_privacy_filter", "phimoe", "qwen2_moe",
    "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe", "qwen4_exp",
    "solar_open", "step3p7", "switch_transformers", "unlimited_ocr", "zaya",
)  # fmt: skip
"""Every family of transformers 5.23 with mixture-of-experts blocks, by its folder's name."""

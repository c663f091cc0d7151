"""Make a tiny random instance of any transformers model type, to look at or to test with.

Only sizes are set, by the names that configurations use for them; the architecture stays the
model type's own.
"""

import dataclasses
import importlib
import inspect
from typing import Any

import torch
from torch import nn

from moecc.runtime.errors import MissingExtra, ModelError

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "sliding_window": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "first_k_dense_replace": 0, "num_dense_layers": 0,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
_MULTI_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "deepseek_v2": _MULTI_LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": _MULTI_LATENT | {"first_k_dense_replace": 1, "num_hidden_layers": 3},
    "qwen3_moe": {"norm_topk_prob": True},
}
"""Settings that a model type needs beyond small sizes."""


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Make the configuration.

    Raises `ModelError` for an unknown model type, `MissingExtra` without transformers.
    """
    try:
        mapping: Any = importlib.import_module("transformers").CONFIG_MAPPING
    except ImportError as error:
        raise MissingExtra(
            "model types need transformers: pip install moecc[transformers]"
        ) from error
    if model_type not in mapping:
        raise ModelError(
            f"{model_type!r} is no checkpoint folder, no file.py:factory and no model type of "
            "the installed transformers"
        )
    kind: Any = mapping[model_type]
    known = (
        {field.name for field in dataclasses.fields(kind)}
        if dataclasses.is_dataclass(kind)
        else set(inspect.signature(kind.__init__).parameters)
    )
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config: Any = kind
    return config(**sizes | EXCEPTIONS.get(model_type, {}) | changes)


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> nn.Module:
    """Make a causal language model of a few layers with random weights, in eval mode."""
    config = tiny_config(model_type, **changes)
    auto: Any = importlib.import_module("transformers").AutoModelForCausalLM
    torch.manual_seed(seed)
    try:
        model: nn.Module = auto.from_config(config, dtype=dtype)
    except ValueError as error:
        raise ModelError(f"{model_type!r} is not a causal language model: {error}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.05)  # some models leave expert weights uninitialised
            elif not torch.isfinite(parameter).all():
                parameter.zero_()
    return model.eval()

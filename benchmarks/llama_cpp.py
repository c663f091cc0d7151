"""Run a Qwen3-MoE decoder with llama.cpp, from a GGUF file that is written here.

Needs PyPI's `gguf` and `xllamacpp`, which is llama.cpp's server in one library (`pip install
moecc[llama]`); times are those that it reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

TYPES = {"int8": "Q8_0", "int4": "Q4_0", "bf16": "BF16", "fp32": "F32"}
"""ggml's name of the same bits."""
_LAYER = {
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "self_attn.q_norm.weight": "attn_q_norm",
    "self_attn.k_norm.weight": "attn_k_norm",
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate.weight": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_OUTER = {
    "model.embed_tokens.weight": "token_embd",
    "model.norm.weight": "output_norm",
    "lm_head.weight": "output",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One generation, and the seconds that it took."""

    prefill: float
    """Of the prompt and the first new token."""
    token: float
    """Of each token after that."""
    tokens: tuple[int, ...]


def installed() -> bool:
    """Tell whether llama.cpp and what writes its files are there."""
    return all(find_spec(name) is not None for name in ("gguf", "xllamacpp"))


class Decoder:
    """A model that llama.cpp reads from a file, in one slot."""

    def __init__(self, file: Path, threads: int, context: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.n_batch = params.n_ubatch = context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def run(self, prompt: Sequence[int], steps: int) -> Generated:
        """Go on after a prompt with so many tokens, always the most likely one."""
        answer = self._complete(prompt, steps)
        timings = answer["timings"]
        return Generated(
            prefill=timings["prompt_ms"] / 1e3,
            token=timings["predicted_ms"] / 1e3 / (steps - 1),
            tokens=tuple(map(int, answer["choices"][0]["text"].split("t")[1:])),
        )

    def log_probabilities(self, prompt: Sequence[int], vocabulary: int) -> torch.Tensor:
        """Give those of all tokens after a prompt."""
        answer = self._complete(prompt, 1, logprobs=vocabulary)
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        values = torch.full((vocabulary,), float("nan"))
        values[[one["id"] for one in found]] = torch.tensor([one["logprob"] for one in found])
        return values

    def _complete(self, prompt: Sequence[int], steps: int, **more: Any) -> Any:
        request = {"prompt": list(prompt), "n_predict": steps, "temperature": 0, **more}
        answer = self._server.handle_completions(
            request | {"cache_prompt": False, "ignore_eos": True}
        )
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp answered {answer}")
        return answer


def write(model: nn.Module, file: Path, experts: str, others: str) -> Path:
    """Write a model with its experts, and its other matrices, in these ggml types.

    Norms and routers stay in float32, as llama.cpp's own conversion has them.
    """
    import gguf

    def kind(name: str, tensor: torch.Tensor) -> Any:
        wide = tensor.dim() == 1 or "gate_inp" in name
        chosen = experts if "_exps" in name else others
        return gguf.GGMLQuantizationType["F32" if wide else chosen]

    writer = gguf.GGUFWriter(file, "qwen3moe")
    _describe(writer, model.config)
    tensors = _tensors(model)
    for name, tensor in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kind(name, tensor))
        size = int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, kind(name, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(_quantized(tensor, kind(name, tensor)))
    writer.close()
    return file


def alike(experts: torch.Tensor) -> bool:
    """Tell whether all experts [E, ..] have the values of the first."""
    return all(torch.equal(one, experts[0]) for one in experts[1:])


def _quantized(tensor: torch.Tensor, kind: Any) -> np.ndarray:
    import gguf

    def bytes_of(part: torch.Tensor) -> np.ndarray:
        return gguf.quants.quantize(part.float().numpy(), kind).view(np.uint8)

    if tensor.dim() == 3 and alike(tensor):
        return np.repeat(bytes_of(tensor[:1]), len(tensor), axis=0)
    return bytes_of(tensor)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give a model's tensors by llama.cpp's names."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name in _OUTER:
            found[f"{_OUTER[name]}.weight"] = parameter
            continue
        _, _, layer, rest = name.split(".", 3)
        if rest == "mlp.experts.gate_up_proj":
            gate, up = parameter.chunk(2, dim=1)
            found[f"blk.{layer}.ffn_gate_exps.weight"] = gate
            found[f"blk.{layer}.ffn_up_exps.weight"] = up
        else:
            found[f"blk.{layer}.{_LAYER[rest]}.weight"] = parameter
    return found


def _describe(writer: Any, config: Any) -> None:
    """Write a model's sizes, and a vocabulary of nothing but numbers."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    size = config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{number}" for number in range(size)])
    writer.add_token_types([1] * size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

"""Write checkpoints in codes, by the formats' public descriptions, beside what the codes stand for.

Codes, zeros and scales are drawn; a weight is computed from these, never from what is packed.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moecc.tiny import tiny_model

Tensors = dict[str, torch.Tensor]
Writer = Callable[..., tuple[Tensors, torch.Tensor]]
"""From a name and [N, K] to the tensors in codes, by name, and the weight that they stand for."""
LINEAR = re.compile(r"(experts\.\d+\.(gate|up|down)|self_attn\.[qkvo])_proj\.weight")
EIGHT_OF_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def draw(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape)


def spread(per_group: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Give [K, N] what groups of K, [groups, N], have."""
    return per_group.repeat_interleave(group, 0)[:columns]


def words(fours: torch.Tensor) -> torch.Tensor:
    """Put eight 4-bit integers of the last dimension into an int32, the first lowest."""
    parts = fours.long().unflatten(-1, (-1, 8))
    word = sum(parts[..., i] << 4 * i for i in range(8))
    assert isinstance(word, torch.Tensor)
    return torch.where(word >= 2**31, word - 2**32, word).int()


def gptq(
    name: str, rows: int, columns: int, *, group: int = 32, sym: bool = False, act: bool = False
) -> tuple[Tensors, torch.Tensor]:
    size = columns if group == -1 else group
    groups = -(-columns // size)
    codes, zeros = draw(0, 16, columns, rows), draw(0, 16, groups, rows)
    if sym:
        zeros = torch.full_like(zeros, 8)
    scales = (torch.rand(groups, rows) * 0.02 + 0.001).half()
    order = torch.arange(columns) // size
    if act:
        order = order[torch.randperm(columns)]
    weight = (codes - zeros[order]) * scales.float()[order]
    tensors = {
        "qweight": words(codes.T).T.contiguous(),
        "qzeros": words((zeros - 1) % 16),
        "scales": scales,
        "g_idx": order.int(),
    }
    return {name.replace("weight", key): one for key, one in tensors.items()}, weight.T


def awq(
    name: str, rows: int, columns: int, *, group: int = 32, **_: Any
) -> tuple[Tensors, torch.Tensor]:
    size = columns if group == -1 else group
    codes, zeros = draw(0, 16, columns, rows), draw(0, 16, -(-columns // size), rows)
    scales = (torch.rand(len(zeros), rows) * 0.02 + 0.001).half()
    weight = (codes - spread(zeros, size, columns)) * spread(scales.float(), size, columns)

    def packed(matrix: torch.Tensor) -> torch.Tensor:
        return words(matrix.unflatten(1, (-1, 8))[:, :, EIGHT_OF_AWQ].flatten(1))

    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}
    return {name.replace("weight", key): one for key, one in tensors.items()}, weight.T


def fp8(name: str, rows: int, columns: int, *, block: int = 128) -> tuple[Tensors, torch.Tensor]:
    codes = (torch.randn(rows, columns) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // block), -(-columns // block)) * 1e-3
    known = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return {name: codes, f"{name}_scale_inv": scales}, codes.float() * known


FORMATS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "sym": False, "group_size": 32}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
}


def write(
    folder: Path, method: str, *, inner: int = 128, experts: int = 6, **more: Any
) -> tuple[Path, Path]:
    """Write a Qwen3-MoE in codes and with plain weights; return both folders.

    `more` is for the format's writer: `group`, `sym`, `act`, `block`.
    """
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=256, intermediate_size=64, moe_intermediate_size=inner,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
        num_experts=experts, num_experts_per_tok=2, decoder_sparse_step=1, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    coded, plain = folder / "coded", folder / "plain"
    Qwen3MoeForCausalLM(config).save_pretrained(plain)
    writer, settings = FORMATS[method]
    tensors: Tensors = {}
    known = load_file(plain / "model.safetensors")
    for name, weight in known.items():
        if LINEAR.search(name):
            found, stands_for = writer(name, *weight.shape, **more)
            tensors |= found
            known[name] = stands_for.contiguous()
        else:
            tensors[name] = weight
    settings = settings | {key: more[old] for key, old in SETTINGS.items() if old in more}
    if "block" in more:
        settings["weight_block_size"] = [more["block"]] * 2
    save_file(known, plain / "model.safetensors", metadata={"format": "pt"})
    return save_coded(plain, coded, tensors, settings), plain


SETTINGS = {"group_size": "group", "sym": "sym", "desc_act": "act"}


def save_coded(plain: Path, coded: Path, tensors: Tensors, settings: dict[str, Any]) -> Path:
    coded.mkdir()
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings}
    (coded / "config.json").write_text(json.dumps(config))
    return coded


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def write_gpt_oss(folder: Path) -> tuple[Path, Path]:
    """Write a GPT-OSS with experts in MXFP4 and with plain weights; return both folders."""
    coded, plain = folder / "coded", folder / "plain"
    model: Any = tiny_model("gpt_oss", hidden_size=64, intermediate_size=96)
    model.config.dtype = "float32"
    model.save_pretrained(plain)
    known = load_file(plain / "model.safetensors")
    tensors: Tensors = {}
    for name, weight in known.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = weight
            continue
        experts, columns, rows = weight.shape
        codes = draw(0, 16, experts, rows, columns // 32, 32)
        scales = draw(118, 125, experts, rows, columns // 32)
        scales[0, 0] = 0  # of a group that is all zeros
        codes[0, 0] = 0
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
        values = E2M1[codes] * 2.0 ** (scales.float() - 127).unsqueeze(-1)
        known[name] = values.flatten(-2).mT.contiguous()
    save_file(known, plain / "model.safetensors", metadata={"format": "pt"})
    return save_coded(plain, coded, tensors, {"quant_method": "mxfp4"}), plain

"""Read a GGUF file as a checkpoint: its configuration, and its tensors under transformers' names.

transformers reads these files too, but makes floats of all experts at once, and leaves settings of
MoE models at their defaults. Names come from the table of the `gguf` package.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moecc.checkpoint.coded import Coded
from moecc.checkpoint.files import Tensor
from moecc.checkpoint.formats.gguf import Gguf
from moecc.checkpoint.pieces import Piece, Stored, cat
from moecc.runtime.errors import MissingExtra, ModelError, StoreError

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
}
"""What transformers calls settings that every architecture has."""
_EXPERTS = re.compile(r"\.layers\.(\d+)\..*\.experts\.(gate_up|down)_proj$")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    model_type: str
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    permuted: bool = False
    """Rows of queries and keys alternate between the halves that a rotation pairs."""


_MOE = {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"}
_ARCHITECTURES = {
    "qwen3moe": _Architecture(
        model_type="qwen3_moe", settings=_MOE, fixed={"norm_topk_prob": True}
    ),
    "qwen2moe": _Architecture(
        model_type="qwen2_moe",
        settings=_MOE | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "llama": _Architecture(
        model_type="mixtral", settings={"expert_count": "num_local_experts"}, permuted=True
    ),
    "olmoe": _Architecture(
        model_type="olmoe",
        settings={"expert_count": "num_experts", "attention.clamp_kqv": "clip_qkv"},
    ),
}


def read_gguf(file: Path) -> tuple[Any, dict[str, Piece]]:
    """Give a file's transformers configuration and its pieces by their names in that model.

    Raises `StoreError` for a damaged file, `ModelError` for an architecture that is not known,
    `MissingExtra` without the `gguf` package.
    """
    reader = _reader(file)
    fields = {name: one.contents() for name, one in reader.fields.items()}
    name = str(fields.get("general.architecture"))
    known = _ARCHITECTURES.get(name)
    if known is None or not fields.get(f"{name}.expert_count"):
        raise ModelError(
            f"{str(file)!r} has architecture {name!r}; moecc reads MoE models of "
            f"{list(_ARCHITECTURES)} from GGUF"
        )
    tensors = {one.name: one for one in reader.tensors}
    config = _config(file, known, _without_prefix(fields, name), tensors)
    return config, _pieces(file, known, config, tensors, name)


def _reader(file: Path) -> Any:
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise MissingExtra("GGUF files need the gguf package: pip install moecc[gguf]") from error
    try:
        return gguf.GGUFReader(file)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise StoreError(
            f"{str(file)!r} is no GGUF file, or is cut off ({error}); download it again"
        ) from error


def _without_prefix(fields: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(f"{prefix}."): value for name, value in fields.items()}


def _config(
    file: Path, known: _Architecture, fields: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Any:
    if fields.get("rope.scaling.type", "none") != "none":
        raise ModelError(
            f"{str(file)!r} scales its rotations ({fields['rope.scaling.type']}), which is not "
            "read from GGUF; load the model from safetensors"
        )
    names = {**_SETTINGS, **known.settings}
    given = {ours: fields[theirs] for theirs, ours in names.items() if theirs in fields}
    if "expert_weights_norm" in fields:
        given["norm_topk_prob"] = bool(fields["expert_weights_norm"])
    transformers: Any = importlib.import_module("transformers")
    return transformers.AutoConfig.for_model(
        known.model_type,
        **{**known.fixed, **given},
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("rope.freq_base", 1e4)},
        tie_word_embeddings="output.weight" not in tensors,
        dtype=torch.float32,
    )


def _pieces(
    file: Path, known: _Architecture, config: Any, tensors: Mapping[str, Any], name: str
) -> dict[str, Piece]:
    gguf: Any = importlib.import_module("gguf")
    transformers: Any = importlib.import_module("transformers")
    (architecture,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names: Any = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    pieces: dict[str, Piece] = {}
    for path, parameter in model.state_dict().items():
        if expert := _EXPERTS.search(path):
            parts = ("gate", "up") if expert[2] == "gate_up" else ("down",)
            theirs = [f"blk.{expert[1]}.ffn_{part}_exps.weight" for part in parts]
            if all(one in tensors for one in theirs):
                pieces[path] = cat([_piece(file, tensors[one]) for one in theirs], 1)
            continue
        stem, _, suffix = path.rpartition(".")
        theirs = f"{names.get_name(stem)}.{suffix}"
        if theirs in tensors:
            pairs = heads.get(theirs.split(".")[-2], 1) if known.permuted else 1
            pieces[path] = _Arranged(_piece(file, tensors[theirs]), tuple(parameter.shape), pairs)
    return pieces


def _piece(file: Path, tensor: Any) -> Piece:
    kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
    start = int(tensor.data_offset)
    if kind in _PLAIN:
        return Stored(Tensor(file=file, offset=start, shape=shape, dtype=_PLAIN[kind]))
    rows = shape[:-1]
    row = int(tensor.n_bytes) // max(1, torch.Size(rows).numel())
    stored = Tensor(file=file, offset=start, shape=(*rows, row), dtype=torch.uint8)
    return Coded(tensor.name, {"codes": stored}, Gguf(kind=kind))


class _Arranged(Piece):
    """A weight in the shape and the order of rows that its model has."""

    def __init__(self, piece: Piece, shape: tuple[int, ...], heads: int) -> None:
        super().__init__("arranged", shape, [piece])
        self._heads = heads

    def read(self, tensor: Any) -> torch.Tensor:
        """Read it; of pairs of rows within a head, all first ones come first."""
        known = self.parts[0].read(tensor)
        if self._heads > 1:
            known = known.reshape(self._heads, -1, 2, known.shape[1]).transpose(1, 2)
        return known.reshape(self.shape).contiguous()

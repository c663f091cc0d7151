"""moecc.load of GGUF files: experts keep the blocks that came."""

import multiprocessing
import resource
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch

import moecc
from moecc import planning
from moecc.checkpoint.pack import pack
from moecc.runtime.errors import ModelError, StoreError
from moecc.runtime.offload.stand_in import lender_of
from moecc.runtime.schemes.packing import unpack_experts
from moecc.tiny import tiny_model
from tests.models import relative_error
from tests.test_load import banks, resident

IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 3, 64, 12]])
FAMILIES = {"qwen3moe": "qwen3_moe", "qwen2moe": "qwen2_moe", "llama": "mixtral", "olmoe": "olmoe"}
TYPES = {
    "Q8_0": "int8-g32", "Q4_0": "int4-g32", "Q4_1": "int4-g32-zeros", "MXFP4": "mxfp4",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order rows as llama.cpp rotates them: the two halves of each head in turn."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(
    folder: Path,
    architecture: str,
    experts: str,
    rest: str = "F32",
    inner: int = 96,
    count: int = 8,
    **extra: Any,
) -> tuple[Path, Path]:
    """Write a tiny model to a GGUF file, and what that stands for to a checkpoint."""
    model: Any = tiny_model(
        FAMILIES[architecture], hidden_size=64, **({"num_experts": count} if count > 8 else {}),
        intermediate_size=inner, moe_intermediate_size=inner,
        shared_expert_intermediate_size=64, num_attention_heads=2, head_dim=32, clip_qkv=None,
        norm_topk_prob=architecture == "qwen3moe", num_key_value_heads=2, dtype="float32",
    )  # fmt: skip
    config, file = model.config, folder / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_shared_feed_forward_length(64)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(32)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    for name, value in extra.items():
        writer.add_string(name.replace("__", "."), value)
    (arch,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def add(name: str, weight: torch.Tensor, kind: str) -> torch.Tensor:
        wanted = gguf.GGMLQuantizationType[kind if weight.dim() > 1 else "F32"]
        data = gguf.quantize(weight.contiguous().numpy(), wanted)
        writer.add_tensor(name, data, raw_dtype=wanted)
        return torch.from_numpy(numpy.ascontiguousarray(gguf.dequantize(data, wanted)))

    for path, parameter in model.state_dict().items():
        stem, suffix = path.rsplit(".", 1)
        if path.endswith("experts.gate_up_proj"):
            layer = path.split(".")[2]
            for name, half in zip(("gate", "up"), parameter.chunk(2, dim=1), strict=True):
                half.copy_(add(f"blk.{layer}.ffn_{name}_exps.weight", half, experts))
        elif path.endswith("experts.down_proj"):
            layer = path.split(".")[2]
            parameter.copy_(add(f"blk.{layer}.ffn_down_exps.weight", parameter, experts))
        else:
            theirs = f"{names.get_name(stem)}.{suffix}"
            heads = (
                2 if architecture == "llama" and ("attn_q." in theirs or "attn_k." in theirs) else 0
            )
            weight = permuted(parameter, heads) if heads else parameter
            if "ffn_gate_inp_shexp" in theirs:
                weight = weight[0]
            kind = rest if "attn" in theirs else "F32"
            known = add(theirs, weight, kind)
            if not heads:
                parameter.copy_(known.reshape(parameter.shape))
            else:
                parameter.copy_(known.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(folder / "plain")
    return file, folder / "plain"


def check(model: Any, plain: Path, scheme: str) -> None:
    want = resident(plain)
    for path, module in model.named_modules():
        if not hasattr(module, "is_transposed"):
            continue
        lender: Any = lender_of(module.down_proj)
        assert str(lender.schemes) == scheme
        known = want.get_submodule(path)
        gate, up = known.gate_up_proj.chunk(2, dim=1)
        for name, weight in (("gate_up", gate), ("up", up), ("down", known.down_proj)):
            got = unpack_experts(lender.tensors[name], tuple(weight.shape), lender.schemes.first)
            assert torch.equal(got, weight)


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_stand_for_what_they_stood_for(kind: str, tmp_path: Path) -> None:
    file, plain = write(tmp_path, "qwen3moe", kind)
    check(moecc.load(file), plain, TYPES[kind])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_architecture_computes_the_same(architecture: str, tmp_path: Path) -> None:
    file, plain = write(tmp_path, architecture, "Q8_0", rest="Q4_0")
    model = moecc.load(file, kernels="torch")
    want = resident(plain, kernels="torch")(IDS).logits
    assert relative_error(model(IDS).logits, want) < 1e-5
    said = "gguf weights outside of experts are dequantized to float32"
    assert any(said in note for note in moecc.report(model).notes)


def test_plain_types_stay_plain(tmp_path: Path) -> None:
    file, plain = write(tmp_path, "qwen3moe", "F16")
    got = moecc.load(file)(IDS).logits
    assert relative_error(got, resident(plain)(IDS).logits) < 1e-5


@pytest.mark.parametrize("kind", ["Q4_0", "F32"])
def test_experts_stay_on_disk(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecc.loading.cache_folder", lambda: tmp_path / "cache")
    file, _ = write(tmp_path, "llama", kind, rest="Q8_0")
    want = moecc.load(file, kernels="torch")(IDS).logits
    model = moecc.load(file, expert_memory="50%", kernels="torch")
    assert torch.equal(model(IDS).logits, want)
    assert {bank.pool.slots for bank in banks(model)} == {4}
    planned, lent = planning.run(str(file), 0.5, []), moecc.report(model).experts
    assert lent is not None
    assert planned.slot_bytes == lent.memory_bytes
    packed = pack(file, tmp_path / "packed")
    again = moecc.load(tmp_path / "packed", expert_memory="50%", kernels="torch")
    assert torch.equal(again(IDS).logits, want)
    assert any("were dequantized when they were packed" in one for one in moecc.report(again).notes)
    assert packed.files[0].name == "model.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(StoreError, match=r"model.gguf' has changed since it was packed"):
        moecc.load(tmp_path / "packed")


def _peak_of_packing(small: str, source: str, folder: str, told: Any) -> None:
    """Tell what packing a file takes beyond what packing a small one took."""
    torch.set_num_threads(1)
    pack(Path(small), Path(f"{folder}-small"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pack(Path(source), Path(folder))
    told.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def test_memory_holds_a_few_experts_not_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small").mkdir()
    small, _ = write(tmp_path / "small", "qwen3moe", "Q8_0")
    monkeypatch.setattr("moecc.tiny._MOST_PARAMETERS", 10**8)
    file, _ = write(tmp_path, "qwen3moe", "Q8_0", inner=2048, count=64)  # 54 MB, 0.4 MB an expert
    total = file.stat().st_size
    context = multiprocessing.get_context("forkserver")
    model = "transformers.models.qwen3_moe.modeling_qwen3_moe"
    context.set_forkserver_preload(["moecc.checkpoint.pack", "gguf", model])
    told = context.Queue()
    process = context.Process(
        target=_peak_of_packing, args=(str(small), str(file), str(tmp_path / "packed"), told)
    )
    process.start()
    peak = told.get(timeout=300)
    process.join()
    assert total > 50e6
    assert peak < total / 3


def test_types_that_kernels_do_not_read_are_named(tmp_path: Path) -> None:
    file, plain = write(tmp_path, "qwen3moe", "Q5_0")
    with pytest.raises(StoreError, match=r"ffn_gate_exps.*not Q5_0.*give quantize="):
        moecc.load(file)
    got = moecc.load(file, quantize="int8", kernels="torch")(IDS).logits
    assert torch.equal(got, moecc.load(plain, quantize="int8", kernels="torch")(IDS).logits)


def test_what_is_not_read_is_refused(tmp_path: Path) -> None:
    file, _ = write(tmp_path, "qwen3moe", "Q8_0")
    data = bytearray(file.read_bytes())
    tensor = next(one for one in gguf.GGUFReader(file).tensors if "down_exps" in one.name)
    data[int(tensor.data_offset) : int(tensor.data_offset) + 2] = b"\xff\x7f"
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(
        StoreError, match=r"cannot pack expert 0 .*down_exps.*scales hold inf or NaN"
    ):
        moecc.load(tmp_path / "nan.gguf")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(StoreError, match=r"cut.gguf.*cut off"):
        moecc.load(tmp_path / "cut.gguf")


def test_rotations_that_are_scaled_are_refused(tmp_path: Path) -> None:
    file, _ = write(tmp_path, "qwen3moe", "Q8_0", qwen3moe__rope__scaling__type="yarn")
    with pytest.raises(ModelError, match=r"scales its rotations .yarn"):
        moecc.load(file)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "dense.gguf", "qwen3")
    writer.add_tensor("token_embd.weight", numpy.zeros((4, 4), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'qwen3'; moecc reads MoE models of"):
        moecc.load(tmp_path / "dense.gguf")

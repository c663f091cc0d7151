"""moecc.load: any transformers MoE, its experts read from disk when a token needs them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moecc
from moecc import backend, capture
from moecc.on_device import bring_to_device
from moecc.passes.options import Options
from moecc.runtime.errors import InputError, ModelError, OptionError, StoreError, StrictError
from moecc.runtime.offload.bank import Bank
from moecc.runtime.offload.link import Link
from moecc.runtime.offload.stand_in import lender_of
from moecc.tiny import tiny_model
from tests.runtime.offload.dry_device import DryDevice

REFERENCE = Path(__file__).parent.parent / "benchmarks" / "reference"
IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 3, 64, 12]])
FAMILIES = (
    "qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "gpt_oss", "phimoe", "granitemoe", "jamba",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a tiny model of a family, once for each way of saving it."""
    made: dict[str, Path] = {}

    def save(family: str, shard: str | None = None, **changes: Any) -> Path:
        key = f"{family} {shard} {changes}"
        if key not in made:
            made[key] = folder = tmp_path_factory.mktemp(family)
            dtype = torch.bfloat16 if family == "gpt_oss" else torch.float32
            model: Any = tiny_model(family, dtype, **changes)
            model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        return made[key]

    return save


def resident(folder: Path, **options: Any) -> Any:
    """Give the model as transformers loads it, with moecc's kernels."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert backend.moecc  # importing it installs the hooks
    capture.adopt(model, Options.parse(options))
    return model


def banks(model: Any) -> list[Bank]:
    found = (lender_of(one) for one in model.parameters())
    return list(dict.fromkeys(one for one in found if isinstance(one, Bank)))


def links(model: Any) -> set[Link]:
    return {bank.pool.link for bank in banks(model)}


def slots(model: Any) -> list[int]:
    return [bank.pool.slots for bank in banks(model)]


def smallest(model: Any, active: int) -> int:
    return sum(active * bank.store.layout.size for bank in banks(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_same_bits_at_every_budget(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family)
    kept = resident(folder)
    expected, shorter = kept(IDS).logits, kept(IDS[:, :3]).logits
    whole = moecc.load(folder, expert_memory="100%")
    assert torch.equal(whole(IDS).logits, expected)
    assert {bank.pool.slots for bank in banks(whole)} == {8}
    for memory in ("25%", smallest(whole, 2)):
        model = moecc.load(folder, expert_memory=memory)
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS[:, :3]).logits, shorter)
        assert slots(model) == [2] * len(banks(model))


def test_a_budget_that_is_one_byte_short_is_refused(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    needed = smallest(moecc.load(folder, expert_memory="100%"), 2)
    with pytest.raises(OptionError, match=rf"take {needed:,} in 2 blocks.*smallest that works"):
        moecc.load(folder, expert_memory=needed - 1)


def test_shards_and_tied_embeddings_make_no_difference(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe", shard="100KB", tie_word_embeddings=True)
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = moecc.load(folder, expert_memory="50%")
    assert torch.equal(model(IDS).logits, resident(folder)(IDS).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_checkpoints_have_a_tensor_for_each_expert_or_for_all(
    checkpoint: Callable[..., Path],
) -> None:
    def names(family: str) -> list[str]:
        return list(load_file(checkpoint(family) / "model.safetensors"))

    assert any(".experts.3.gate_proj" in name for name in names("qwen3_moe"))
    assert any(".experts.gate_up_proj" in name for name in names("gpt_oss"))


def test_the_shipped_model_generates_the_same_tokens() -> None:
    prompt = torch.tensor([[17, 250, 9, 1]])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    whole = resident(REFERENCE)
    expected, logits = whole.generate(prompt, **settings), whole(prompt).logits
    for memory in ("25%",):
        model = moecc.load(REFERENCE, expert_memory=memory)
        assert torch.equal(model(prompt).logits, logits)
        assert torch.equal(model.generate(prompt, **settings), expected)


def test_the_torch_emitter_gives_the_same_bits_too(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("gpt_oss")
    model = moecc.load(folder, expert_memory="25%", kernels="torch")
    assert torch.equal(model(IDS).logits, resident(folder, kernels="torch")(IDS).logits)


def test_wanting_gradients_is_an_error_and_never_garbage(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("gpt_oss")
    model = moecc.load(folder, expert_memory="25%")
    with torch.enable_grad(), pytest.raises(InputError, match=r"on disk.*under torch.no_grad"):
        model(IDS)
    assert torch.equal(model(IDS).logits, resident(folder)(IDS).logits)


def test_loading_reads_no_expert(tmp_path: Path) -> None:
    folder, big = tmp_path / "big", {"num_experts": 64, "moe_intermediate_size": 256}
    tiny_model("qwen3_moe", num_hidden_layers=1, **big).save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    read = Path("/proc/self/io").read_text().split()[1]
    model = moecc.load(folder, expert_memory="25%")
    during = int(Path("/proc/self/io").read_text().split()[1]) - int(read)
    assert during < size / 4
    assert [link.bytes for link in links(model)] == [0]
    model(IDS[:, :1])
    (bank,) = banks(model)
    assert [link.bytes for link in links(model)] == [2 * 3 * 64 * 256 * 4]
    assert bank.pool.trace.counts.misses == 2


def test_the_state_is_not_saved(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model: Any = moecc.load(checkpoint("qwen3_moe"), expert_memory="25%")
    with pytest.raises(InputError, match=r"on disk, not in the model.*copy the checkpoint"):
        model.state_dict()
    with pytest.raises(InputError, match="on disk, not in the model"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["half", "double", "to"])
def test_casting_says_to_load_it_that_way(change: str, checkpoint: Callable[..., Path]) -> None:
    model: Any = moecc.load(checkpoint("qwen3_moe"), expert_memory="25%")
    cast = model.to(torch.bfloat16) if change == "to" else getattr(model, change)()
    with pytest.raises(InputError, match="moved or cast after its experts were left on disk"):
        cast(IDS)


def test_moving_to_where_it_is_changes_nothing(checkpoint: Callable[..., Path]) -> None:
    model: Any = moecc.load(checkpoint("qwen3_moe"), expert_memory="25%")
    expected = model(IDS).logits
    assert torch.equal(model.to("cpu").float()(IDS).logits, expected)


def test_compiled_it_gives_the_bits_of_the_compiled_resident_model(
    checkpoint: Callable[..., Path],
) -> None:
    folder = checkpoint("qwen3_moe", num_hidden_layers=1)

    def outputs(model: Any) -> list[torch.Tensor]:
        torch._dynamo.reset()
        how: dict[str, Any] = {"dynamic": True, "fullgraph": True, "options": {"inner": "eager"}}
        compiled = torch.compile(model.forward, backend="moecc", **how)
        made = [compiled(IDS, use_cache=False).logits]
        with torch.compiler.set_stance("fail_on_recompile"):
            made += [compiled(IDS[0, :n][None], use_cache=False).logits for n in (4, 7)]
        return made

    expected = outputs(resident(folder))
    model = moecc.load(folder, expert_memory="25%")
    got = outputs(model)
    assert all(map(torch.equal, got, expected))
    assert all(bank.pool.trace.counts.requests == 3 for bank in banks(model))


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_slots_may_be_on_a_device(
    quantize: str | None, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, device = checkpoint("qwen3_moe"), DryDevice()
    expected = moecc.load(folder, quantize=quantize)(IDS).logits
    monkeypatch.setattr("moecc.on_device.new_device", lambda _: device)
    assert torch.equal(moecc.load(folder, quantize=quantize)(IDS).logits, expected)
    model = moecc.load(folder, expert_memory="50%", quantize=quantize)
    for _ in range(3):
        assert torch.equal(model(IDS).logits, expected)
    assert all(bank.store.pinned for bank in banks(model))
    misses = sum(bank.pool.trace.counts.misses for bank in banks(model))
    assert sum(what == "copy" for what, *_ in device.log) == misses > 8
    helped = moecc.load(folder, expert_memory="50%", misses="home", quantize=quantize)
    assert torch.equal(helped(IDS).logits, expected)
    assert sum(bank.pool.trace.counts.home for bank in banks(helped)) >= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantize", [None, "int4"])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_model_on_a_gpu_has_its_slots_there(
    kernels: str, quantize: str | None, checkpoint: Callable[..., Path]
) -> None:
    options: dict[str, Any] = {"device": "cuda", "kernels": kernels, "quantize": quantize}
    whole = moecc.load(checkpoint("qwen3_moe"), **options)
    model = moecc.load(checkpoint("qwen3_moe"), expert_memory="50%", **options)
    assert torch.equal(model(IDS.to("cuda")).logits, whole(IDS.to("cuda")).logits)


def test_misses_at_home_are_refused_where_that_is_everywhere(
    checkpoint: Callable[..., Path],
) -> None:
    folder = checkpoint("qwen3_moe")
    load_bad(folder, OptionError, "misses='home' is for models on a device", misses="home")


def test_a_scheme_without_a_kernel_on_the_device_is_told(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_gpu(model: Any, absent: Any, lenders: Any, device: Any, *rest: Any) -> Any:
        return bring_to_device(model, absent, lenders, torch.device("cuda"), *rest)

    monkeypatch.setattr("moecc.on_device.new_device", lambda _: DryDevice())
    monkeypatch.setattr("moecc.loading.bring_to_device", to_gpu)
    folder, low = checkpoint("qwen3_moe"), {"expert_memory": "50%", "quantize": "int3"}
    notes = moecc.report(moecc.load(folder, **low)).notes
    assert sum("torch computes its int3-g32 experts: triton" in one for one in notes) == 2
    load_bad(folder, StrictError, "a scheme has no kernel on cuda", strict=True, **low)


def test_compiling_for_another_scheme_is_refused(checkpoint: Callable[..., Path]) -> None:
    model: Any = moecc.load(checkpoint("qwen3_moe"), quantize="int8")
    for other in ("int4", {"*.down_proj": "int4", "*": "int8"}, "4.5bpw"):
        with pytest.raises(OptionError, match=r"quantize=.*were loaded in int8; leave it out"):
            torch.compile(model, backend="moecc", options={"quantize": other})
    for same in ("int8", None, {"elsewhere.*": "int4"}):
        torch.compile(model, backend="moecc", options={"quantize": same})


def test_compiling_for_another_budget_is_refused(checkpoint: Callable[..., Path]) -> None:
    model: Any = moecc.load(checkpoint("qwen3_moe"), expert_memory="50%", policy="lfu")
    for name, other in {"expert_memory": "25%", "policy": "lookahead", "misses": "home"}.items():
        with pytest.raises(OptionError, match=rf"{name}=.* but the model was loaded with"):
            torch.compile(model.forward, backend="moecc", options={name: other})
        with pytest.raises(OptionError, match=rf"{name}=.*leave it out"):
            torch.compile(model.model.layers[0], backend="moecc", options={name: other})
    for same in ({}, {"expert_memory": "50%"}, {"policy": "lfu"}, {"policy": "auto"}):
        torch.compile(model, backend="moecc", options=same)


@pytest.fixture
def damaged(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint, to be damaged."""
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint("qwen3_moe", shard="100KB"), folder)
    return folder


def shard_with(folder: Path, part: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return next(folder / file for name, file in index["weight_map"].items() if part in name)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def load_bad(folder: Path, error: type[Exception], match: str, **options: Any) -> None:
    with pytest.raises(error, match=match):
        moecc.load(folder, **{"expert_memory": "25%", **options})


def test_a_shard_that_is_cut_off_is_named(damaged: Path) -> None:
    file = shard_with(damaged, "layers.1.mlp.experts.5.up_proj")
    os.truncate(file, file.stat().st_size - 9)
    load_bad(damaged, StoreError, f"{file.name}.*cut off; download it again")


def test_a_shard_that_is_missing_is_named(damaged: Path) -> None:
    file = shard_with(damaged, "layers.1.mlp.experts.5.up_proj")
    file.unlink()
    load_bad(damaged, StoreError, f"lacks .*{file.name}.*download it again")


def test_an_expert_that_is_missing_is_named(damaged: Path) -> None:
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    rewrite(shard_with(damaged, name), lambda tensors: tensors.__delitem__(name))
    load_bad(damaged, StoreError, r"model.layers.1.mlp.experts.gate_up_proj")


def test_all_experts_of_a_block_missing_is_named(damaged: Path) -> None:
    for file in damaged.glob("*.safetensors"):
        rewrite(file, lambda tensors: [tensors.pop(n) for n in [*tensors] if "1.mlp.exp" in n])
    load_bad(damaged, StoreError, r"nothing for parameter 'model.layers.1.mlp.experts.gate_up_proj")


@pytest.mark.parametrize("expert", [0, 5])
def test_an_expert_of_the_wrong_shape_is_named(damaged: Path, expert: int) -> None:
    name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
    rewrite(shard_with(damaged, name), lambda t: t.update({name: t[name][:-1].contiguous()}))
    load_bad(damaged, StoreError, r"model.layers.1.mlp.experts.gate_up_proj")


def test_an_expert_of_another_dtype_is_converted(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.loading.cache_folder", lambda: tmp_path / "cache")
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    rewrite(shard_with(damaged, name), lambda t: t.update({name: t[name].half()}))
    model = moecc.load(damaged, expert_memory="50%")
    assert torch.equal(model(IDS).logits, resident(damaged)(IDS).logits)


def test_an_index_that_is_none_is_named(damaged: Path) -> None:
    for text in ("[]", "{}", "{", '{"weight_map": 3}'):
        (damaged / "model.safetensors.index.json").write_text(text)
        load_bad(damaged, StoreError, r"index.json.*is not an index of shards")


@pytest.mark.parametrize("data", [b"", b"\x08\0\0\0\0\0\0\0nonsense", b"\xff" * 16])
def test_a_file_that_is_no_safetensors_file_is_named(damaged: Path, data: bytes) -> None:
    file = shard_with(damaged, "layers.1.mlp.experts.5.up_proj")
    file.write_bytes(data)
    load_bad(damaged, StoreError, file.name)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(tmp_path)
    load_bad(tmp_path, ModelError, "no experts")


def test_a_name_that_means_nothing_is_refused(tmp_path: Path) -> None:
    load_bad(tmp_path / "nowhere", ModelError, "nowhere")
    load_bad(tmp_path, StoreError, r"holds no \*.safetensors file")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    load_bad(tmp_path, ModelError, "cannot load")


def test_bad_options_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    load_bad(tmp_path, OptionError, "expert_memory.*'lots'", expert_memory="lots")
    load_bad(tmp_path, OptionError, r"unknown option.*expert_menory", expert_menory="25%")
    load_bad(tmp_path, OptionError, "policy.*'random'", policy="random")

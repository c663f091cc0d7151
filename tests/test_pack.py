import json
import multiprocessing
import random
import resource
import signal
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moecc
from moecc.checkpoint.pack import pack
from moecc.checkpoint.packed import read_manifest
from moecc.runtime.errors import ModelError, OptionError, StoreError

IDS = torch.tensor([[5, 17, 3, 99, 41, 7]])


def make(folder: Path, experts: int = 8, inner: int = 32, layers: int = 2, **more: Any) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, moe_intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts=experts, num_experts_per_tok=2, decoder_sparse_step=1, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "mxfp4"])
def test_a_packed_model_computes_what_the_checkpoint_does(
    source: Path, tmp_path: Path, scheme: str | None
) -> None:
    pack(source, tmp_path, scheme)
    whole = moecc.load(source, quantize=scheme)
    packed = moecc.load(tmp_path, expert_memory="30%")
    assert torch.equal(logits(packed), logits(whole))


def test_a_budget_and_a_scheme_pack_beside_the_caches(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.loading.cache_folder", lambda: tmp_path)
    first = moecc.load(source, quantize="int8", expert_memory="50%")
    (made,) = (tmp_path / "packed").iterdir()
    written = (made / "moecc.json").stat().st_mtime_ns
    again = moecc.load(source, quantize="int8", expert_memory="50%")
    assert (made / "moecc.json").stat().st_mtime_ns == written
    assert torch.equal(logits(first), logits(again))


def test_a_damaged_store_beside_the_caches_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.loading.cache_folder", lambda: tmp_path)
    first = moecc.load(source, quantize="int8", expert_memory="50%")
    (made,) = (tmp_path / "packed").iterdir()
    (made / "moecc.json").write_text("{}")
    again = moecc.load(source, quantize="int8", expert_memory="50%")
    assert torch.equal(logits(first), logits(again))


def test_any_reader_opens_a_shard(source: Path, tmp_path: Path) -> None:
    manifest = pack(source, tmp_path)
    block = manifest.blocks[0]
    records = load_file(tmp_path / block.file)[block.path]
    assert records.shape == (8, block.layout.size)
    first = block.layout.tensors(records)["gate_up"]
    gate = load_file(source / "model.safetensors")["model.layers.0.mlp.experts.3.gate_proj.weight"]
    assert torch.equal(first[3, : len(gate)], gate)


def _pack_for(source: str, folder: str, seconds: float, told: Any) -> None:
    """Pack; killed by a signal, without any clean-up, after so many seconds."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    pack(Path(source), Path(folder), "int4")
    signal.setitimer(signal.ITIMER_REAL, 0)
    told.put(time.perf_counter() - began)


def _peak_of_packing(source: str, folder: str, scheme: str | None, told: Any) -> None:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pack(Path(source), Path(folder), scheme)
    told.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


@pytest.fixture(scope="module")
def fresh() -> Any:
    """A server whose forks have imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    model = "transformers.models.qwen3_moe.modeling_qwen3_moe"
    context.set_forkserver_preload(["moecc.checkpoint.pack", model])
    return context


def test_killed_at_random_it_resumes_to_the_same_bytes(
    source: Path, tmp_path: Path, fresh: Any
) -> None:
    pack(source, tmp_path / "whole", "int4")
    told, chance = fresh.Queue(), random.Random(0)

    def run(folder: str, seconds: float) -> int:
        arguments = (str(source), str(tmp_path / folder), seconds, told)
        process = fresh.Process(target=_pack_for, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    assert run("timed", 0.0) == 0  # a timer of 0 never fires
    seconds = told.get(timeout=10)
    ends = [run("killed", chance.uniform(0.01, 0.4) * seconds) for _ in range(20)]
    assert set(ends) <= {0, -signal.SIGALRM}
    assert ends.count(-signal.SIGALRM) >= 5
    pack(source, tmp_path / "killed", "int4")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_stopped_between_any_two_files_it_goes_on(
    source: Path, tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(source, tmp_path / "whole")
    from moecc.checkpoint import pack as module

    own, written = module._write_shard, []

    def write(*args: Any) -> None:
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(args)
        own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_shard", write)
        patch.setattr(module, "write_pieces", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "stopped")
    written_before = len(written)
    monkeypatch.setattr(module, "_write_shard", lambda *args: (written.append(args), own(*args)))
    pack(source, tmp_path / "stopped")
    assert len(written) == 2
    assert written_before == shards
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_memory_holds_a_few_experts_not_all(tmp_path: Path, fresh: Any, scheme: str | None) -> None:
    large = make(tmp_path / "large", experts=64, inner=1024)  # 100 MB, 0.8 MB an expert
    total = (large / "model.safetensors").stat().st_size
    told = fresh.Queue()
    arguments = (str(large), str(tmp_path / "packed"), scheme, told)
    process = fresh.Process(target=_peak_of_packing, args=arguments)
    process.start()
    peak = told.get(timeout=120)
    process.join()
    assert total > 90e6
    assert peak < total / 3


def test_a_full_disk_says_so_and_keeps_what_is_packed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moecc.checkpoint import pack as module

    own, written = module._write_shard, []

    def write(*args: Any) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(args)
        own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_shard", write)
        with pytest.raises(StoreError, match=r"No space left.*kept, run moecc pack again"):
            pack(source, tmp_path / "full")
    assert (tmp_path / "full" / "experts-00000.safetensors").is_file()
    assert not list((tmp_path / "full").glob("*.part"))
    pack(source, tmp_path / "full")
    pack(source, tmp_path / "whole")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_packing_twice_writes_nothing(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    pack(source, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_another_store_is_not_written_over(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path, "int8")
    with pytest.raises(StoreError, match="holds another store"):
        pack(source, tmp_path, "int4")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("all of it")
    with pytest.raises(StoreError, match="holds other files"):
        pack(source, tmp_path / "own")


def change(folder: Path, name: str, alter: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = alter(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("value", "scheme"), [(torch.inf, "int4"), (torch.nan, "int4"), (torch.nan, "5bpw")]
)
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float, scheme: str) -> None:
    folder = make(tmp_path / "source")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    change(folder, name, lambda tensor: tensor.index_fill(0, torch.tensor([3]), value))
    where = r"expert 5 of 'model.layers.1.mlp.experts'.*gate_up weights hold inf or NaN"
    with pytest.raises(StoreError, match=where):
        pack(folder, tmp_path / "packed", scheme)


def test_weights_that_are_no_floats_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "source")
    change(folder, "model.layers.1.mlp.experts.5.down_proj.weight", lambda one: one.to(torch.int8))
    with pytest.raises(
        StoreError, match=r"expert 5 of '.*1.mlp.experts'.*second product are .*int8"
    ):
        pack(folder, tmp_path / "packed", "int4")


def test_experts_of_zeros_are_packed(tmp_path: Path) -> None:
    folder = make(tmp_path / "source")
    for part in ("gate", "up", "down"):
        change(folder, f"model.layers.0.mlp.experts.2.{part}_proj.weight", torch.zeros_like)
    for scheme in ("int8", "int4", "mxfp4"):
        pack(folder, tmp_path / scheme, scheme)
        model = moecc.load(tmp_path / scheme, expert_memory="50%")
        assert logits(model).isfinite().all()


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "source")
    pack(folder, tmp_path / "packed")
    change(folder, "model.layers.0.mlp.gate.weight", lambda tensor: tensor * 2)
    with pytest.raises(StoreError, match="has changed since it was packed"):
        moecc.load(tmp_path / "packed", expert_memory="50%")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    moecc.load(tmp_path / "packed", expert_memory="50%")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "moecc.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_format_is_refused(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path)
    edit(tmp_path, format=99)
    with pytest.raises(StoreError, match=r"packed in format 99.*run moecc pack again"):
        moecc.load(tmp_path)


@pytest.mark.parametrize(
    "lie",
    [{"blocks": 3}, {"dtype": None}, {"files": [{"name": "x"}]}],
)
def test_a_damaged_manifest_is_named(source: Path, tmp_path: Path, lie: dict[str, Any]) -> None:
    pack(source, tmp_path)
    edit(tmp_path, **lie)
    with pytest.raises((StoreError, OptionError)):
        moecc.load(tmp_path)


def test_a_manifest_that_lies_about_its_shards_is_refused(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path)
    blocks = json.loads((tmp_path / "moecc.json").read_text())["blocks"]
    blocks[1]["experts"] = 9
    edit(tmp_path, blocks=blocks)
    with pytest.raises(StoreError, match=r"says that 'experts-00001.safetensors' holds"):
        moecc.load(tmp_path)
    edit(tmp_path, blocks=blocks[:1])
    with pytest.raises(ModelError, match="which is not its model"):
        moecc.load(tmp_path)


def test_a_shard_that_is_cut_off_is_named(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path)
    shard = tmp_path / "experts-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5000])
    with pytest.raises(StoreError, match=r"experts-00001.*cut off"):
        moecc.load(tmp_path)


def test_a_flipped_bit_is_found_when_the_expert_is_read(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path)
    shard = tmp_path / "experts-00000.safetensors"
    data = bytearray(shard.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for expert in range(8):
        data[start + expert * (len(data) - start) // 8 + 100] ^= 1
    shard.write_bytes(data)
    model = moecc.load(tmp_path, expert_memory="50%")
    with pytest.raises(StoreError, match=r"expert \d of 'model.layers.0.mlp.experts'.*checksum"):
        logits(model)


def test_a_scheme_or_dtype_that_it_was_not_packed_in_is_refused(
    source: Path, tmp_path: Path
) -> None:
    pack(source, tmp_path, "int8")
    assert {str(block.schemes) for block in read_manifest(tmp_path).blocks} == {"int8"}
    with pytest.raises(OptionError, match="is packed as int8, not as int4-g32"):
        moecc.load(tmp_path, quantize="int4")
    with pytest.raises(OptionError, match=r"is packed for torch\.float32"):
        moecc.load(tmp_path, dtype=torch.bfloat16)

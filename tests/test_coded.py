"""moecc.load of checkpoints in MXFP4, FP8, GPTQ and AWQ: experts keep the codes that came."""

import json
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moecc
from moecc import planning
from moecc.checkpoint.pack import pack
from moecc.runtime.errors import ModelError, StoreError
from moecc.runtime.offload.stand_in import lender_of
from moecc.runtime.schemes.packing import unpack_experts
from tests.coded_checkpoints import write, write_gpt_oss
from tests.models import relative_error
from tests.test_load import resident

IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 3, 64, 12]])
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mxfp4": ("mxfp4", {}, "mxfp4"),
    "fp8": ("fp8", {}, "fp8-b128"),
    "fp8, rows that fill no block": ("fp8", {"inner": 192}, "fp8-b128"),
    "gptq": ("gptq", {}, "int4-g32-points"),
    "gptq, rows that fill no group": ("gptq", {"inner": 80, "group": 64}, "int4-g64-points"),
    "gptq, symmetric": ("gptq", {"sym": True, "group": 128}, "int4-g128"),
    "gptq, whole rows": ("gptq", {"group": -1}, "int4-g128-points"),
    "awq": ("awq", {"group": 64}, "int4-g64-points"),
    "awq, groups of two of ours": ("awq", {"group": 256, "inner": 256}, "int4-g128-points"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("moecc.loading.cache_folder", lambda: tmp_path / "cache")
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Write a checkpoint of a kind, and what its codes stand for, once."""
    made: dict[str, tuple[Path, Path]] = {}

    def find(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            method, more, _ = KINDS[kind]
            folder = tmp_path_factory.mktemp(method)
            made[kind] = (
                write_gpt_oss(folder) if method == "mxfp4" else write(folder, method, **more)
            )
        return made[kind]

    return find


def experts(model: Any) -> dict[str, Any]:
    return {
        path: module for path, module in model.named_modules() if hasattr(module, "is_transposed")
    }


@kinds
def test_the_codes_stand_for_the_weights_they_stood_for(
    kind: str, checkpoint: Callable[[str], tuple[Path, Path]]
) -> None:
    coded, plain = checkpoint(kind)
    model, known = moecc.load(coded), experts(resident(plain))
    for path, module in experts(model).items():
        lender: Any = lender_of(module.down_proj)
        assert str(lender.schemes) == KINDS[kind][2]
        first, down = known[path].gate_up_proj, known[path].down_proj
        if module.is_transposed:
            first, down = first.mT, down.mT
        interleaved = kind == "mxfp4"
        gate, up = (first[:, ::2], first[:, 1::2]) if interleaved else first.chunk(2, dim=1)
        for name, weight in (("gate_up", gate), ("up", up), ("down", down)):
            got = unpack_experts(lender.tensors[name], tuple(weight.shape), lender.schemes.first)
            assert torch.equal(got, weight)


@kinds
def test_the_model_computes_with_them(
    kind: str, checkpoint: Callable[[str], tuple[Path, Path]]
) -> None:
    coded, plain = checkpoint(kind)
    want = resident(plain, kernels="torch")(IDS).logits
    assert relative_error(moecc.load(coded, kernels="torch")(IDS).logits, want) < 1e-5
    got = moecc.load(coded)(IDS).logits
    errors = [relative_error(*pair) for pair in zip(got[0], want[0], strict=True)]
    assert median(errors) < 0.02  # inputs are rounded to 8 bits
    assert torch.equal(moecc.load(coded, expert_memory="50%")(IDS).logits, got)


@pytest.mark.parametrize("kind", ["mxfp4", "fp8", "gptq", "awq"])
def test_a_packed_store_of_it_computes_the_same(
    kind: str, checkpoint: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    coded, _ = checkpoint(kind)
    pack(coded, tmp_path)
    packed = moecc.load(tmp_path, expert_memory="50%")
    assert torch.equal(packed(IDS).logits, moecc.load(coded)(IDS).logits)
    planned, lent = planning.run(str(coded), 0.5, []), moecc.report(packed).experts
    assert lent is not None
    assert planned.slot_bytes == lent.memory_bytes


@pytest.mark.parametrize(("kind", "count"), [("fp8", 8), ("gptq", 8), ("mxfp4", 0)])
def test_the_report_says_what_was_dequantized(
    kind: str, count: int, checkpoint: Callable[[str], tuple[Path, Path]]
) -> None:
    model = moecc.load(checkpoint(kind)[0], dtype=torch.bfloat16)
    said = f"{count} {kind} weights outside of experts are dequantized to bfloat16"
    assert (said in moecc.report(model).notes) == bool(count)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["mxfp4", "fp8", "gptq"])
def test_quantize_rounds_them_anew(
    kind: str, checkpoint: Callable[[str], tuple[Path, Path]]
) -> None:
    coded, plain = checkpoint(kind)
    got = moecc.load(coded, quantize="int8", kernels="torch")(IDS).logits
    assert torch.equal(got, moecc.load(plain, quantize="int8", kernels="torch")(IDS).logits)


def test_attention_may_be_in_act_order_and_experts_may_not(tmp_path: Path) -> None:
    coded, plain = write(tmp_path, "gptq", act=True)
    want = resident(plain, kernels="torch")
    with pytest.raises(StoreError, match=r"expert 0 .*gate_proj.*g_idx is in act-order.*quantize="):
        moecc.load(coded)
    model: Any = moecc.load(coded, quantize="int8", kernels="torch")
    for name in ("q_proj", "o_proj"):
        path = f"model.layers.1.self_attn.{name}.weight"
        assert torch.equal(model.get_parameter(path), want.get_parameter(path))


def test_experts_of_a_layer_may_be_one_tensor(
    checkpoint: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    coded, _ = checkpoint("fp8")
    tensors = load_file(coded / "model.safetensors")
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        for suffix in ("", "_scale_inv"):
            gate, up, down = (
                torch.stack(
                    [tensors.pop(f"{path}.{e}.{name}_proj.weight{suffix}") for e in range(6)]
                )
                for name in ("gate", "up", "down")
            )
            tensors[f"{path}.gate_up_proj{suffix}"] = torch.cat([gate, up], dim=1)
            tensors[f"{path}.down_proj{suffix}"] = down
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((coded / "config.json").read_text())
    assert torch.equal(moecc.load(tmp_path)(IDS).logits, moecc.load(coded)(IDS).logits)


EXPERT = "model.layers.1.mlp.experts.3.up_proj"


def damage(kind: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    coded, _ = write(folder, KINDS[kind][0], **KINDS[kind][1])
    tensors = load_file(coded / "model.safetensors")
    change(tensors)
    save_file(tensors, coded / "model.safetensors")
    return coded


def fill(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def cut(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("gptq", fill(f"{EXPERT}.scales", float("nan")), "up_proj.weight.*scales hold inf or NaN"),
        ("gptq", fill(f"{EXPERT}.g_idx", 99), f"{EXPERT}.weight.*g_idx .* is not a group for each"),
        ("gptq", cast(f"{EXPERT}.qweight", torch.int64), f"{EXPERT}.weight.*codes are torch.int64"),
        ("gptq", cut(f"{EXPERT}.scales"), f"{EXPERT}.weight.*do not fit 128 rows of 256 in groups"),
        ("gptq", drop(f"{EXPERT}.qzeros"), f"{EXPERT}.qweight.*is without.*{EXPERT}.qzeros"),
        ("gptq, symmetric", fill(f"{EXPERT}.qzeros", 0), f"{EXPERT}.weight.*zeros differ"),
        ("awq", fill(f"{EXPERT}.scales", float("inf")), "up_proj.weight.*scales hold inf or NaN"),
        ("awq", cast(f"{EXPERT}.qzeros", torch.int16), f"{EXPERT}.weight.*zeros are torch.int16"),
        ("awq", cut(f"{EXPERT}.qzeros"), f"{EXPERT}.weight.*do not fit 128 rows of 256 in groups"),
        (
            "awq",
            lambda tensors: cast(f"{EXPERT}.scales", torch.float32)(tensors)
            or fill(f"{EXPERT}.scales", 1e-3)(tensors),
            f"{EXPERT}.weight.*torch.float32 scales have values that float16 has not",
        ),
        (
            "fp8",
            fill(f"{EXPERT}.weight_scale_inv", float("nan")),
            "up_proj.weight.*scales hold inf or NaN",
        ),
        ("fp8", fill(f"{EXPERT}.weight", float("nan")), f"{EXPERT}.weight.*weights hold NaN"),
        ("fp8", cast(f"{EXPERT}.weight", torch.uint8), f"{EXPERT}.weight.*not a float8_e4m3fn"),
        ("fp8", cut(f"{EXPERT}.weight"), f"experts have different shapes|{EXPERT}.*"),
        ("fp8", cut(f"{EXPERT}.weight_scale_inv"), f"{EXPERT}.weight.*blocks of 128 x 128 need"),
        ("fp8", drop(f"{EXPERT}.weight_scale_inv"), f"{EXPERT}.weight.*is fp8 without scales"),
        (
            "fp8",
            drop("model.layers.0.self_attn.k_proj.weight"),
            r"is without \['model.layers.0.self_attn.k_proj.weight'",
        ),
        ("gptq", drop("model.norm.weight"), r"has nothing for \['model.norm.weight'\]"),
    ],
)  # fmt: skip
def test_a_bad_tensor_is_named(
    kind: str, change: Callable[[dict[str, torch.Tensor]], Any], said: str, tmp_path: Path
) -> None:
    folder = damage(kind, tmp_path, change)
    with pytest.raises(StoreError, match=said):
        moecc.load(folder)


def test_bad_blocks_of_mxfp4_are_named(tmp_path: Path) -> None:
    coded, _ = write_gpt_oss(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(coded / "model.safetensors")
    tensors[f"{name}_scales"][2, 1, 0] = 255
    save_file(tensors, coded / "model.safetensors")
    with pytest.raises(StoreError, match=rf"expert 2 .*{name}.*scales hold NaN"):
        moecc.load(coded)
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:, :, 1:].contiguous()
    save_file(tensors, coded / "model.safetensors")
    with pytest.raises(StoreError, match=rf"{name}.*are not \[.., N, K / 32, 16\]"):
        moecc.load(coded)


def test_a_shard_that_is_cut_off_is_named(tmp_path: Path) -> None:
    coded, _ = write(tmp_path, "gptq")
    file = coded / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(StoreError, match=r"model.safetensors.* tensor 'model.*it is cut off"):
        moecc.load(coded)


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= settings
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("method", "more", "settings", "said"),
    [
        ("gptq", {"group": 16}, {}, "groups of 16 are no whole number of groups of 32.*quantize="),
        ("gptq", {}, {"bits": 3}, "codes of 3 bits are not read"),
        ("awq", {}, {"version": "gemv"}, "version 'gemv', is not read"),
        ("fp8", {"block": 64}, {}, "blocks of 128 x 128, not 64 x 64.*quantize="),
        ("fp8", {}, {"weight_block_size": None}, "names no weight_block_size"),
    ],
)
def test_what_kernels_do_not_read_is_refused(
    method: str, more: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    coded, _ = write(tmp_path, method, **more)
    configure(coded, **settings)
    with pytest.raises(StoreError, match=said):
        moecc.load(coded)


def test_a_method_that_is_not_read_is_named(tmp_path: Path) -> None:
    coded, _ = write(tmp_path, "gptq")
    configure(coded, quant_method="quip")
    with pytest.raises(ModelError, match=r"quant_method is 'quip'.*'mxfp4', 'fp8', 'gptq', 'awq'"):
        moecc.load(coded, expert_memory="50%")


def _peak_of_packing(source: str, folder: str, told: Any) -> None:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pack(Path(source), Path(folder))
    told.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def test_memory_holds_a_few_experts_not_all(tmp_path: Path) -> None:
    coded, _ = write(tmp_path, "fp8", experts=96, inner=1024)  # 150 MB, 0.8 MB an expert
    total = (coded / "model.safetensors").stat().st_size
    context = multiprocessing.get_context("forkserver")
    model = "transformers.models.qwen3_moe.modeling_qwen3_moe"
    context.set_forkserver_preload(["moecc.checkpoint.pack", model])
    told = context.Queue()
    arguments = (str(coded), str(tmp_path / "packed"), told)
    process = context.Process(target=_peak_of_packing, args=arguments)
    process.start()
    peak = told.get(timeout=120)
    process.join()
    assert total > 140e6
    assert peak < total / 3

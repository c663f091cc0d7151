"""Calibration: errors of rounding weigh as much as an expert's inputs are large."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moecc
from moecc import one_by_one, packing
from moecc.calibrate import calibrate
from moecc.checkpoint import pack as module
from moecc.checkpoint.calibration import Calibration
from moecc.checkpoint.pack import pack
from moecc.runtime.errors import ModelError, OptionError
from moecc.runtime.offload.stand_in import lender_of
from moecc.runtime.schemes.packing import dequantize, quantize, unpack_experts
from moecc.runtime.schemes.scheme import INT8, MXFP4, Scheme, int4
from tests.test_load import resident
from tests.test_pack import contents, make

PROMPT = torch.arange(60)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("moecc.loading.cache_folder", lambda: tmp_path / "cache")
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second block never chooses its last expert."""
    folder = make(tmp_path_factory.mktemp("source"))
    tensors = load_file(folder / "model.safetensors")
    router = tensors["model.layers.1.mlp.gate.weight"]
    router[7] = router[:7].mean(0)  # never among the two best
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def seen(source: Path) -> Calibration:
    with torch.no_grad():
        return calibrate(source, [PROMPT])


def test_it_sees_what_the_model_gives_its_experts(source: Path, seen: Calibration) -> None:
    model, found = resident(source, kernels="torch"), {}
    block = model.model.layers[1].mlp

    def note(_: Any, args: Any) -> None:
        found["hidden"] = args[0].flatten(0, 1)

    block.register_forward_pre_hook(note)
    model(PROMPT.unsqueeze(0))
    _, _, ids = block.gate(found["hidden"])
    experts = block.experts
    for expert in range(8):
        x = found["hidden"][(ids == expert).any(1)]
        gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate) * up
        known = seen.blocks["model.layers.1.mlp.experts"]
        assert known.seen[expert] == len(x)
        assert torch.allclose(known.first[expert], x.square().sum(0), rtol=1e-4)
        assert torch.allclose(known.second[expert], inner.square().sum(0), rtol=1e-4)


def test_an_expert_without_a_token_is_fitted_without_and_named(
    source: Path, seen: Calibration
) -> None:
    assert str(seen).startswith("calibrated on 60 tokens")
    assert "fitted without: model.layers.1.mlp.experts [7]" in str(seen)
    model: Any = moecc.load(source, quantize="int4", calibrate=[PROMPT])
    assert str(seen) in moecc.report(model).notes
    plain: Any = moecc.load(source, quantize="int4")
    one, other = (
        lender_of(each.model.layers[1].mlp.experts.down_proj).tensors["down"]
        for each in (model, plain)
    )
    changed = (one != other).flatten(1).any(1).tolist()
    assert changed == [True] * 7 + [False]


def test_errors_weigh_what_the_calibration_says(source: Path, seen: Calibration) -> None:
    model: Any = moecc.load(source, quantize="int4-g64-zeros", calibrate=[PROMPT])
    path = "model.layers.0.mlp.experts"
    lender: Any = lender_of(model.model.layers[0].mlp.experts.down_proj)
    weights = resident(source).get_submodule(path).down_proj
    got = unpack_experts(lender.tensors["down"], tuple(weights.shape), lender.schemes.second)
    for expert in range(8):
        importance = seen.blocks[path].second[expert]
        want = dequantize(
            quantize(weights[expert], lender.schemes.second, importance), lender.schemes.second
        )
        assert torch.equal(got[expert], want[:, : weights.shape[2]])


@pytest.mark.parametrize(
    "scheme", [int4(), int4(64, zeros=True), int4(points=True), MXFP4], ids=str
)
def test_a_weighed_fit_has_a_smaller_error_of_products(scheme: Scheme) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    size = torch.randn(256).exp()
    importance = size.square()

    def error(given: torch.Tensor | None) -> float:
        lost = dequantize(quantize(weight, scheme, given), scheme) - weight
        return float((lost.square() * importance).sum())

    assert error(importance) < error(None) * (0.995 if scheme == MXFP4 else 0.9)


@pytest.mark.parametrize("scheme", [int4(), int4(zeros=True), MXFP4, INT8], ids=str)
def test_equal_inputs_change_nothing(scheme: Scheme) -> None:
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    plain = dequantize(quantize(weight, scheme), scheme)
    for importance in (torch.full((96,), 3.0), torch.zeros(96)):
        got = dequantize(quantize(weight, scheme, importance), scheme)
        assert torch.allclose(got, plain, atol=2e-3)


def test_a_store_says_what_it_was_calibrated_on(source: Path, tmp_path: Path) -> None:
    seen = calibrate(source, [PROMPT])
    pack(source, tmp_path / "packed", "int4", calibration=seen)
    packed: Any = moecc.load(tmp_path / "packed", expert_memory="50%")
    whole = moecc.load(source, quantize="int4", calibrate=[PROMPT])
    beside: Any = moecc.load(source, quantize="int4", calibrate=[PROMPT], expert_memory="50%")
    for model in (packed, beside):
        assert str(seen) in moecc.report(model).notes
        assert torch.equal(model(PROMPT[None, :9]).logits, whole(PROMPT[None, :9]).logits)
    manifest = json.loads((tmp_path / "packed" / "moecc.json").read_text())
    assert manifest["calibration"] == str(seen)


def test_a_calibrated_store_stopped_on_its_way_gets_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again() -> Calibration:
        return calibrate(source, [PROMPT], compensate=True)

    pack(source, tmp_path / "whole", "int4", calibration=again())
    own, written = module._write_shard, []

    def stop(*args: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(own(*args))

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "stopped", "int4", calibration=again())
    pack(source, tmp_path / "stopped", "int4", calibration=again())
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_errors_are_compensated_where_enough_was_seen(source: Path) -> None:
    prompts = [torch.randint(128, (500,), generator=torch.Generator().manual_seed(0))]
    plain: Any = moecc.load(source, quantize="int4", calibrate=prompts)
    model: Any = moecc.load(source, quantize="int4", calibrate=prompts, compensate=True)
    (note,) = [one for one in moecc.report(model).notes if one.startswith("calibrated")]
    few = calibrate(source, prompts, compensate=True).blocks
    for number, (path, seen) in enumerate(few.items()):
        named = [expert for expert in range(8) if seen.seen[expert] < 64]
        assert (f"{path} {named}" in note) == bool(named)
        one, other = (
            lender_of(each.model.layers[number].mlp.experts.down_proj).tensors["down"]
            for each in (model, plain)
        )
        changed = (one != other).flatten(1).any(1).tolist()
        assert changed == [expert not in named for expert in range(8)]
    assert "errors compensated, but for experts with too few tokens" in note


def test_what_cannot_be_compensated_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="compensate needs prompts"):
        moecc.load(source, quantize="int4", compensate=True)
    with pytest.raises(OptionError, match="give --calibrate too"):
        packing.run(str(source), source / "packed", "int4", "auto", quiet=True, compensate=True)
    monkeypatch.setattr(Path, "read_text", lambda _: "MemAvailable:   100 kB")
    with pytest.raises(OptionError, match=r"holds 327,680 bytes of products.*102,400 are free"):
        one_by_one._check_memory(327_680)


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ([PROMPT], {}, "give quantize= too"),
        ([], {"quantize": "int4"}, "takes prompts of two tokens or more"),
        ([PROMPT[:1]], {"quantize": "int4"}, "takes prompts of two tokens or more"),
        ("a text", {"quantize": "int4"}, "it takes a list of them"),
    ],
)
def test_what_cannot_calibrate_is_refused(
    given: Any, options: dict[str, Any], said: str, source: Path
) -> None:
    with pytest.raises(OptionError, match=said):
        moecc.load(source, calibrate=given, **options)


def test_texts_need_a_tokenizer(source: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer for calibration texts"):
        moecc.load(source, quantize="int4", calibrate=["In the beginning"])


def test_a_budget_is_shared_from_the_checkpoint(source: Path, tmp_path: Path) -> None:
    whole: Any = moecc.load(source, quantize="5bpw", kernels="torch")
    in_memory = resident(source)
    torch.compile(in_memory, backend="moecc", options={"quantize": "5bpw", "kernels": "torch"})
    want = in_memory(PROMPT[None]).logits  # chosen from the same experts, held in memory
    assert torch.equal(whole(PROMPT[None]).logits, want)
    schemes = {block["schemes"] for block in moecc.report(whole).experts.blocks}
    pack(source, tmp_path / "packed", "5bpw")
    packed: Any = moecc.load(tmp_path / "packed", expert_memory="50%", kernels="torch")
    beside: Any = moecc.load(source, quantize="5bpw", expert_memory="50%", kernels="torch")
    for model in (packed, beside):
        assert {block["schemes"] for block in moecc.report(model).experts.blocks} == schemes
        assert torch.equal(model(PROMPT[None]).logits, want)
    with pytest.raises(OptionError, match="is packed, its bits are shared out"):
        moecc.load(tmp_path / "packed", quantize="5bpw")
    with pytest.raises(OptionError, match=r"'2\.1bpw' is too small"):
        moecc.load(source, quantize="2.1bpw")

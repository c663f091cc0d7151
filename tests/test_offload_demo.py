import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moecc
from moecc import offload_demo, packing
from moecc.cli import app
from moecc.generate import generate
from moecc.models import load_tokenizer
from moecc.plain import plain

REFERENCE = Path(__file__).parent.parent / "benchmarks" / "reference"
PROMPT = "In the beginning God created the heaven and the earth."


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecc.loading.cache_folder", lambda: tmp_path / "cache")


def test_the_text_is_that_of_the_whole_model_and_the_report_tells_why() -> None:
    options = {"expert_memory": "25%", "inner": "eager"}
    shown = offload_demo.run(str(REFERENCE), PROMPT, 12, 1, options, "float32", quiet=True)
    whole = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(REFERENCE))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert shown.timings[-1].tokens == generate(whole, ids, 12).tokens
    experts = shown.report.experts
    assert experts is not None
    assert [block["slots"] for block in experts.blocks] == [8] * 6
    assert experts.memory_bytes * 4 == experts.total_bytes
    assert 0 < experts.hit_rate < 1
    assert sum(block["predicted"] for block in experts.blocks) > 0
    assert all(0.3 < block["recall"] <= block["wide_recall"] <= 1 for block in experts.blocks)
    text = str(shown.report)
    assert "model.layers.5.mlp.experts" in text
    assert "read from disk" in text
    assert json.dumps(plain(shown))


def test_pack_from_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    arguments = ["pack", str(REFERENCE), "--quantize", "int4", "-o", str(folder), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert (told["blocks"], told["experts"], told["schemes"]) == (6, 192, ["int4-g32"])
    model = moecc.load(folder, expert_memory="50%")
    report = moecc.report(model)
    assert report.experts is not None
    assert {block["schemes"] for block in report.experts.blocks} == {"int4-g32"}


def test_pack_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    done = packing.run(str(REFERENCE), tmp_path / "p", "", "auto", quiet=True)
    packing.print_packed(done, Console())
    assert "192 experts of 6 blocks in the model's dtype" in capsys.readouterr().out


def test_a_packed_model_of_mixed_schemes(tmp_path: Path) -> None:
    from moecc.checkpoint.pack import pack

    quantize = {"*.down_proj": "int8", "*": "int4"}
    pack(REFERENCE, tmp_path / "mixed", quantize)
    whole = moecc.load(REFERENCE, quantize=quantize)
    packed = moecc.load(tmp_path / "mixed", expert_memory="50%")
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, whole(ids).logits)
    report = moecc.report(packed)
    assert report.experts is not None
    assert {block["schemes"] for block in report.experts.blocks} == {"int4-g32 + int8"}

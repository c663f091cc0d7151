"""Every command takes every form of MODEL that makes sense for it, and says so of the others."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from typer.testing import CliRunner

from moecc import cli, inspection, kernel_plans
from moecc.checkpoint.pack import pack
from moecc.inspection import inspect
from moecc.model_forms import Form, form_of
from moecc.models import sketch_model
from moecc.runtime.errors import ModelError, MoeccError
from moecc.tiny import tiny_model

FACTORY = """
from moecc.tiny import tiny_model

def make():
    return tiny_model("qwen3_moe")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a MODEL of each form."""
    folder = tmp_path_factory.mktemp("forms")
    tiny_model("qwen3_moe").save_pretrained(folder / "checkpoint")
    pack(folder / "checkpoint", folder / "packed", "int4")
    (folder / "model.py").write_text(FACTORY)
    (folder / "empty").mkdir()
    (folder / "headless").mkdir()
    shutil.copy(folder / "checkpoint" / "model.safetensors", folder / "headless")
    return folder


@pytest.fixture(autouse=True)
def _offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for the hub: it has one model."""
    import huggingface_hub

    def download(name: str, allow_patterns: list[str]) -> str:
        if name != "org/model":
            raise OSError(f"{name} is nowhere")
        asked.append(allow_patterns)
        return str(folder / "checkpoint")

    asked.clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(folder)


asked: list[list[str]] = []
MODELS = {
    Form.CHECKPOINT: "checkpoint",
    Form.PACKED: "packed",
    Form.HUB: "org/model",
    Form.TYPE: "qwen3_moe",
    Form.FACTORY: "model.py:make",
}


def invoke(*args: str) -> str:
    result = CliRunner().invoke(cli.app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("form", MODELS)
def test_the_form_is_told(form: Form) -> None:
    assert form_of(MODELS[form]) is form


@functools.cache
def traced() -> inspection.Inspection:
    """Trace the model once: it is the same in every form."""
    return inspect(MODELS[Form.CHECKPOINT])


@pytest.mark.parametrize("form", MODELS)
def test_commands_that_read_no_weights_take_every_form(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remembered(name: str, *args: Any, **kwargs: Any) -> Any:
        assert sketch_model(name).inputs[0].shape == (2, 16)
        return traced()

    monkeypatch.setattr(inspection, "inspect", remembered)
    monkeypatch.setattr(kernel_plans, "inspect", remembered)
    for command in ("passes", "why"):
        assert "model.layers.1.mlp.experts" in invoke(command, MODELS[form])
    assert "mlp.experts" in invoke("plan", MODELS[form], "--memory", "50%")
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    text = invoke("kernels", MODELS[form], "--tokens", "1", "--dtype", "float32")
    assert "model.layers.0.mlp.experts and 1 more" in text
    assert all(patterns == ["*.json"] for patterns in asked)
    assert bool(asked) is (form is Form.HUB)


def test_weights_are_loaded_where_they_are_asked_for() -> None:
    assert isinstance(next(sketch_model("checkpoint").model.parameters()), FakeTensor)
    loaded = sketch_model("checkpoint", weights=True).model
    assert type(next(loaded.parameters()).data) is torch.Tensor


@pytest.mark.parametrize("command", ["run", "trace", "profile", "pack"])
@pytest.mark.parametrize("form", [Form.TYPE, Form.FACTORY])
def test_commands_that_read_weights_say_what_has_none(command: str, form: Form) -> None:
    more = {"run": ("-p", "x"), "trace": ("-p", "x", "-o", "t"), "profile": ("-o", "p")}
    with pytest.raises(ModelError, match=rf"is a {form}, which has no tokenizer and no weights"):
        invoke(command, MODELS[form], *more.get(command, ("-o", "x")))


def test_a_packed_store_is_not_packed_again() -> None:
    with pytest.raises(ModelError, match="'packed' is packed already; pack the checkpoint"):
        invoke("pack", "packed", "-o", "again")


def test_a_plan_of_a_packed_store_has_its_bytes() -> None:
    with pytest.raises(MoeccError, match="is packed already; leave --quantize out"):
        invoke("plan", "packed", "--memory", "50%", "--quantize", "int8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3_mo", "knows; did you mean 'qwen3_moe' or"),
        ("./checkpont", "there is nothing at './checkpont'; did you mean 'checkpoint'"),
        ("model.py", "the file 'model.py' is no model; name what makes"),
        ("model.py:mak", "'model.py' has no 'mak'; MODEL is file.py:factory; did you mean 'make'?"),
        ("modle.py:make", "there is no file 'modle.py' (from MODEL 'modle.py:make'); did you mean"),
        ("empty/", "the folder 'empty/' holds no model: it has no config.json"),
        ("headless", "the folder 'headless' has weights and no config.json; copy it there, too"),
        ("org/other", "cannot download 'org/other': OSError: org/other is nowhere"),
    ],
)  # fmt: skip
def test_a_bad_model_says_what_where_and_what_to_do(name: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        invoke("passes", name)
    assert message in str(caught.value)

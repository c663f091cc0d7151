"""Models of hundreds of billions of parameters are looked at without a weight."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from typer.testing import CliRunner

from moecc import cli, fold_layers, inspection
from moecc.checkpoint.configuration import read_config
from moecc.inspection import inspect
from moecc.models import Loaded, skeleton, sketch_model
from moecc.passes.fuse_experts import kernel_spec
from moecc.reasons import answers
from moecc.runtime.errors import ModelError
from moecc.tiny import tiny_config
from moecc.weightless import without_weights

CONFIGS = Path(__file__).parent / "configs"
PUBLISHED = {  # parameters by the model cards, and bytes a weight of the experts as published
    "deepseek_v3": (671e9, 1 + 4 / 128**2),
    "gpt_oss_120b": (117e9, 17 / 32),
    "kimi_k2": (1.04e12, 1 + 4 / 128**2),
    "qwen3_235b_a22b": (235e9, 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_plan_of_a_configuration_alone_adds_up_to_the_published_size(name: str) -> None:
    command = ["plan", str(CONFIGS / name), "--memory", "80GiB", "--json"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    parameters, expert_weight = PUBLISHED[name]
    found = plan["expert_bytes"] / expert_weight + plan["other_bytes"] / 2
    assert found == pytest.approx(parameters, rel=0.015)
    assert 0.9 * 80 * 2**30 < plan["slot_bytes"] <= 80 * 2**30 or plan["hits"] == [1.0, 1.0]


def test_no_weight_is_allocated() -> None:
    model = skeleton(str(CONFIGS / "kimi_k2"))
    assert all(one.is_meta for one in (*model.parameters(), *model.buffers()))
    sketch = sketch_model(str(CONFIGS / "gpt_oss_120b"), all_layers=True).model
    tensors = [*sketch.parameters(), *sketch.buffers()]
    assert all(isinstance(one, FakeTensor) and one.device.type == "cpu" for one in tensors)
    assert sum(one.numel() for one in tensors) == pytest.approx(117e9, rel=0.01)


def test_a_model_type_that_is_not_known_is_read_as_its_architectures(tmp_path: Path) -> None:
    config = read_config(CONFIGS / "kimi_k2")
    assert (config.n_routed_experts, config.dtype) == (384, torch.bfloat16)
    assert type(config).__name__ == "DeepseekV3Config"
    (tmp_path / "config.json").write_text('{"model_type": "a", "architectures": ["B"]}')
    with pytest.raises(
        ModelError, match=r"model_type 'a' and architectures \['B'\].* knows neither"
    ):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="is not a model's configuration"):
        read_config(tmp_path)


def test_layers_that_are_left_out_are_like_those_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold_layers, "_FEW", 4)
    config = tiny_config("deepseek_v3", first_k_dense_replace=2, num_hidden_layers=6)
    config.save_pretrained(tmp_path)
    some, every = (inspect(str(tmp_path), all_layers=how) for how in (False, True))
    (stack,) = some.folded
    assert (stack.path, stack.kept, stack.like) == ("model.layers", 4, (3, 3))
    (answer,) = answers(some, "model.layers.5")
    assert answer.path == "model.layers.5.mlp.experts"
    assert answer.reason.endswith("; seen in model.layers.3.mlp.experts, which is like it")
    assert stack.traced("model.layers.5.mlp") == "model.layers.3.mlp"
    assert stack.traced("model.layers.6.mlp") == "model.layers.6.mlp"
    told = {
        path: (block.router_spec, kernel_spec(block), block.shared)
        for block in some.records[0].blocks
        for path in (block.path, *stack.alike(block.path))
    }
    whole = {
        block.path: (block.router_spec, kernel_spec(block), block.shared)
        for block in every.records[0].blocks
    }
    assert not every.folded
    assert told == whole
    assert len(whole) == 4


def test_only_layers_that_are_alike_are_left_out() -> None:
    class Layer(nn.Module):
        def __init__(self, number: int, kind: str, width: int) -> None:
            super().__init__()
            self.number, self.kind = number, kind
            self.inner = nn.Linear(width, 4, bias=number == 1)

    kinds = ["a", "a", "b", "a", "b", "a", "b", "a", "b", "a"]
    model = nn.ModuleDict({"layers": nn.ModuleList(Layer(i, k, 4) for i, k in enumerate(kinds))})
    (stack,) = fold_layers.fold_layers(model)
    assert (stack.kept, stack.like) == (4, (2, 3, 2, 3, 2, 3))
    wide = nn.ModuleList(Layer(i, "a", 4 + i // 9) for i in range(10))
    assert not fold_layers.fold_layers(nn.ModuleDict({"layers": wide}))
    assert len(wide) == 10


def test_a_type_is_looked_at_in_full_without_weights() -> None:
    seen = inspect("qwen3_moe", full=True)
    assert [block.experts for block in seen.records[0].blocks] == [128, 128]
    assert str(seen.folded[0]).startswith("model.layers: 2 of 24 layers were traced")


def test_a_model_that_decides_by_values_is_told_to_need_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale if (x * self.scale).sum().item() > 0 else x

    model = Deciding()
    mode = without_weights(model)
    with mode:
        loaded = Loaded(
            name="it", model=model, tokenizer=None, inputs=(torch.ones(3),), context=mode
        )
    monkeypatch.setattr(inspection, "sketch_model", lambda *_: loaded)
    with pytest.raises(ModelError, match=r"'it' decides by values .* load them with --weights"):
        inspect("it")

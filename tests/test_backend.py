"""The entry point, the options, and what other backends see."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

import moecc
from moecc.inner import inner_compiler
from moecc.records import all_records
from moecc.runtime.errors import OptionError
from moecc.tiny import tiny_model
from tests.models import Dense, GroupedMoe, relative_error, tokens

EAGER = {"inner": "eager", "kernels": "torch"}


def compiled_blocks(model: nn.Module, *inputs: Any, **options: Any) -> int:
    before = len(all_records())
    with torch.no_grad():
        torch.compile(model, backend="moecc", fullgraph=True, options=EAGER | options)(*inputs)
    return sum(len(record.blocks) for record in all_records()[before:])


def test_torch_finds_the_backend_without_an_import() -> None:
    code = (
        "import torch, sys;"
        "assert 'moecc' in torch.compiler.list_backends();"
        "assert 'moecc.backend' not in sys.modules;"
        "f = torch.compile(lambda x: x + 1, backend='moecc', options={'inner': 'eager'});"
        "assert f(torch.ones(2)).tolist() == [2, 2]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_importing_moecc_is_cheap_and_changes_nothing() -> None:
    code = (
        "import moecc, sys;"
        "assert 'torch' not in sys.modules;"
        "import transformers.integrations.moe as moe;"
        "assert moe.ExpertsInterface.get_interface.__module__ == 'transformers.integrations.moe'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lookhead": 1}, "lookhead"),
        ({"quantize": "int5"}, "int5"),
        ({"quantize": 4}, "4"),
        ({"expert_memory": "lots"}, "lots"),
        ({"expert_memory": "0%"}, "0%"),
        ({"expert_memory": -1}, "-1"),
        ({"lookahead": -1}, "-1"),
        ({"lookahead": True}, "True"),
        ({"policy": "fifo"}, "fifo"),
        ({"kernels": "cuda"}, "cuda"),
        ({"inner": "moecc"}, "moecc"),
        ({"strict": 1}, "strict"),
    ],
)
def test_a_bad_option_is_refused_when_compile_is_called(options: Any, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        torch.compile(nn.Linear(2, 2), backend="moecc", options=options)


def test_hand_written_blocks_are_found_by_structure() -> None:
    model = GroupedMoe()
    x = tokens(6)
    with torch.no_grad():
        expected = model(x)
        got = torch.compile(model, backend="moecc", fullgraph=True, options=EAGER)(x)
    assert relative_error(got, expected) < 1e-2
    assert [len(graph.blocks) for graph in moecc.report(model).graphs] == [1]


def test_a_model_without_moe_runs_and_the_report_says_so() -> None:
    model, x = Dense(), tokens(4, torch.float32)
    with torch.no_grad():
        got = torch.compile(model, backend="moecc", options=EAGER)(x)
        torch.testing.assert_close(got, model(x))
    assert "no MoE block found" in str(moecc.report(model))


def test_a_near_miss_is_in_the_report() -> None:
    class Unsummed(GroupedMoe):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).cumsum(0)

        def activate(self, rows: torch.Tensor) -> torch.Tensor:
            gate, up = rows.chunk(2, dim=-1)
            return gate.cumsum(0) * up

    model = Unsummed()
    assert compiled_blocks(model, tokens(4)) == 0
    (graph,) = moecc.report(model).graphs
    assert any("cumsum" in miss["why"] for miss in graph.misses)


def test_strict_turns_a_fallback_into_an_error() -> None:
    torch_error = torch._dynamo.exc.BackendCompilerFailed
    with pytest.raises(torch_error, match="triton kernels run on cuda"):
        compiled_blocks(GroupedMoe(), tokens(4), kernels="triton", strict=True)
    assert compiled_blocks(GroupedMoe(), tokens(4), kernels="triton") == 1


def test_a_budget_for_experts_in_memory_names_what_keeps_it() -> None:
    torch_error = torch._dynamo.exc.BackendCompilerFailed
    with pytest.raises(torch_error, match=r"OptionError.*moecc.load\(.*moecc.offload\("):
        compiled_blocks(GroupedMoe(), tokens(4), expert_memory="50%")


def test_other_backends_see_what_they_always_saw() -> None:
    model = tiny_model("qwen3_moe")
    ids = torch.randint(3, 99, (1, 8))

    def targets() -> set[str]:
        seen: set[str] = set()

        def keep(gm: Any, _: Any) -> Any:
            seen.update(str(node.target) for node in gm.graph.nodes)
            return gm

        with torch.no_grad():
            torch.compile(model, backend=keep)(ids)
        return seen

    before = targets()
    assert compiled_blocks(model, ids) == 2
    torch._dynamo.reset()
    assert targets() == before
    assert not any("moecc" in target for target in before)


def test_two_models_of_one_class_share_a_graph_and_keep_their_weights() -> None:
    models = [tiny_model("qwen3_moe", seed=seed) for seed in (1, 2)]
    ids = torch.randint(3, 99, (1, 8))
    with torch.no_grad():
        for model in models:
            expected = model(ids).logits
            got = torch.compile(model, backend="moecc", options=EAGER)(ids).logits
            assert relative_error(got, expected) < 1e-5


def test_torch_compile_modes_reach_inductor() -> None:
    f = torch.compile(lambda x: x + 1, backend="moecc", mode="reduce-overhead")
    assert f(torch.ones(2)).tolist() == [2, 2]


def test_the_environment_asks_for_logs_and_graphs(tmp_path: Path) -> None:
    code = (
        "import torch; from tests.models import GroupedMoe, tokens;"
        "m = torch.compile(GroupedMoe(), backend='moecc', options={'inner': 'eager'});"
        "torch.set_grad_enabled(False); m(tokens(4))"
    )
    asked = {"MOECC_LOG": "passes,kernels", "MOECC_DUMP": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | asked, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "moecc.passes: fuse_experts: 1 rewrites" in result.stderr
    assert "moecc.kernels" in result.stderr
    names = {file.name for file in (tmp_path / "graph0").iterdir()}
    assert {"02_fuse_experts.before.txt", "02_fuse_experts.after.txt", "kernel0.txt"} <= names


def test_loops_of_inductor_get_threads_for_enough_work_and_a_mode_is_kept() -> None:
    def patches(mode: str | None) -> Any:
        return inner_compiler("inductor", mode, on_gpu=False).keywords["config_patches"]

    assert patches("reduce-overhead").items() >= {
        ("cpp.min_chunk_size", 2**14), ("triton.cudagraphs", True)
    }  # fmt: skip
    assert "triton.cudagraphs" not in patches(None)
    with inductor.patch({"cpp.min_chunk_size": 2**15}):
        assert patches(None)["cpp.min_chunk_size"] == 2**15

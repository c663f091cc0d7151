"""A whole model for a CUDA device that is not there: traced, lowered, launched on a dry run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")
pytest.importorskip("transformers")


ROUTERS = {
    "gpt_oss": "logits, top-2 of 8, softmax bfloat16 bfloat16",
    "qwen2_moe": "softmax, top-2 of 8 float32 bfloat16",
}


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("kind", "quantize"), [("gpt_oss", []), ("qwen2_moe", ["int4"])])
def test_a_model_on_cuda_runs_triton_kernels_in_one_graph(
    kind: str, quantize: list[str], tmp_path: Path
) -> None:
    module = "tests.codegen.fake_cuda_model"
    command = [sys.executable, "-m", module, kind, str(tmp_path), *quantize]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == ["cuda:0"]
    assert (found["graphs"], found["blocks"]) == (1, 2), "a graph for every token count"
    assert found["kernels"] == [found["expected"]]
    assert found["expected"].startswith("triton int4-g32: " if quantize else "triton: ")
    assert found["routers"] == [f"triton: {ROUTERS[kind]}"]
    assert found["shared"] == (2 if quantize else 0)
    assert found["misses"] == []
    assert found["launches"] == [
        *("decode_down", "decode_gate_up", "grouped_down", "grouped_gate_up"),
        *("persistent_down", "persistent_gate_up", "reduce_terms", "route"),
    ]

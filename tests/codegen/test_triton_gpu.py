"""What only a GPU can show: the same numbers there, and in graphs. And its benchmark, without."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from benchmarks import gpu
from moecc.codegen import triton_emitter
from moecc.codegen.gpus import gpu_of
from moecc.codegen.triton_costs import plans
from tests.codegen.test_triton_low_bit import NAMES, defined, pack
from tests.codegen.triton_cases import assert_close, make_inputs, make_spec, tensors
from tests.codegen.triton_interpreter import interpreted

CUDA = torch.device("cuda")
SIZES = {"hidden": 320, "intermediate": 200, "experts": 8, "dtype": torch.bfloat16}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(("weights", "plans"), [("bf16", 6), ("int4", 5)])
def test_the_benchmark_runs_and_its_numbers_are_those_of_the_definition(
    weights: str, plans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "INPUTS", 1)
    monkeypatch.setattr(gpu, "transformers_peers", lambda *_: ())
    shape = {"hidden": 32, "intermediate": 16, "experts": 4, "active": 2}
    with interpreted():
        rows = gpu.measure(shape, weights, 3, torch.device("cpu"), 1e9, 1e9, every=True)
    assert len({row.contender for row in rows}) == plans
    assert max(row.error for row in rows) < gpu.TOLERANCE
    assert all(row.microseconds > 0 for row in rows)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_low_bit_weights_agree_with_the_definition(name: str) -> None:
    spec, x = pack(make_spec(**SIZES), name, name, make_inputs(make_spec(**SIZES), 40, 3))
    expected = defined(spec, x)
    held = [None if one is None else one.to(CUDA) for one in tensors(x)]
    for plan in plans(spec, gpu_of(CUDA), 3):
        out = triton_emitter.emit(spec, plan).run(*held)
        assert_close(out.cpu(), expected, spec.dtype)
        assert torch.equal(out, triton_emitter.emit(spec, plan).run(*held))


@pytest.mark.gpu
@on_gpu
def test_slots_add_up_to_the_bits_of_all_at_once() -> None:
    spec = make_spec(**SIZES)
    x = make_inputs(spec, 40, 3, device="cuda")
    for plan in plans(spec, gpu_of(CUDA), 3):
        kernel = triton_emitter.emit(spec, plan)
        onto = torch.zeros(x.hidden.shape, device=CUDA)
        for group in ([0, 1, 2], [3], [4, 5, 6, 7]):
            table = torch.full((8,), -1)
            table[group] = torch.tensor(group)
            kernel.add(onto, table, *tensors(x))
        assert torch.equal(onto.to(spec.dtype), kernel.run(*tensors(x)))


@pytest.mark.gpu
@on_gpu
def test_a_graph_of_the_kernels_replays_on_other_routings() -> None:
    spec = make_spec(**SIZES)
    x, other = (make_inputs(spec, 40, 3, seed=seed, device="cuda") for seed in (0, 1))
    for plan in plans(spec, gpu_of(CUDA), 3):
        kernel = triton_emitter.emit(spec, plan)
        expected = kernel.run(*tensors(dataclasses.replace(x, ids=other.ids)))
        kernel.run(*tensors(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel.run(*tensors(x))
        x.ids.copy_(other.ids)
        graph.replay()
        assert torch.equal(out, expected)
        x = make_inputs(spec, 40, 3, device="cuda")

"""What the Triton kernels compile to, beside the record of `benchmarks.static_gpu`."""

import json
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from benchmarks import static_gpu, static_report
from benchmarks.static_peers import PEERS
from benchmarks.static_traffic import DECOMPOSITIONS, DEEPSEEK_V3, launches
from moecc.codegen.gpus import GPUS

COMPILED = ("sm_80", "sm_90", "sm_100")
PERSISTENT = ("sm_90", "sm_100", "sm_120")
KERNELS = {
    "bf16": (
        "decode_gate_up",
        "decode_down",
        "grouped_gate_up 64",
        "grouped_down 16",
        "reduce",
        "persistent_gate_up",
    ),
    "int4": ("decode_gate_up", "grouped_gate_up 16", "grouped_down 128"),
    "fp8-b128": ("grouped_down 64",),
    "DeepSeek-V3's": ("choose_experts",),
}
"""What is compiled here; the record has the rest."""


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    if not static_gpu.RECORD.is_file():
        pytest.skip(f"no {static_gpu.RECORD.name}: python -m benchmarks.static_gpu --json FILE")
    return json.loads(static_gpu.RECORD.read_text())


def rows(record: dict[str, Any]) -> list[static_gpu.Row]:
    return [static_gpu.Row(**row) for row in record["rows"]]


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("weights", KERNELS)
def test_kernels_compile_to_what_was_recorded(
    weights: str, target: str, record: dict[str, Any]
) -> None:
    known = {(row.name, row.target): row for row in rows(record)}
    compared = 0
    for number, launch in enumerate(static_gpu.planned(weights, target)):
        if str(launch).startswith(KERNELS[weights]):
            row = static_gpu.measure(weights, number, target)
            golden = known[row.name, target]
            assert (row.spilled, row.products) == (0, golden.products)
            assert row.registers <= 1.05 * golden.registers, row
            assert row.loop <= 1.05 * golden.loop, row
            assert row.shared <= golden.shared, row
            assert row.async_copies >= golden.async_copies, row
            compared += 1
    missing = weights == "bf16" and target not in PERSISTENT
    assert compared == len(KERNELS[weights]) - missing


def test_the_record_has_every_kernel_on_every_target(record: dict[str, Any]) -> None:
    wanted = {
        (weights, str(launch), target)
        for weights in (*static_gpu.WEIGHTS, *static_gpu.ROUTERS)
        for target in static_gpu.targets_of(weights)
        for launch in static_gpu.planned(weights, target)
    }
    assert {(row.weights, row.kernel, row.target) for row in rows(record)} == wanted


def test_nothing_recorded_spills_and_everything_fits(record: dict[str, Any]) -> None:
    for row in rows(record):
        assert row.spilled == 0, row
        assert row.blocks >= 1, row
        assert row.occupancy > 0.1, row


def test_products_run_on_the_tensor_cores_of_their_target(record: dict[str, Any]) -> None:
    for row in rows(record):
        if row.kernel.startswith(("grouped", "persistent")):
            assert row.products == GPUS[row.target].tensor_cores, row
            assert row.product_count > 0, row
            assert row.async_copies > 0 or GPUS[row.target].is_amd, row
            assert bool(row.descriptor_copies) == row.kernel.startswith("persistent"), row
        else:
            assert not row.products, row
        # A step of fp8 is half as long: 8 bytes a thread.
        halved = row.weights.startswith("fp8") or GPUS[row.target].is_amd
        if row.kernel.startswith("decode") and not halved:
            assert row.wide_loads >= (2 if row.weights == "bf16" else 1), row


def test_products_are_level_with_the_peers_of_the_same_tile(record: dict[str, Any]) -> None:
    """Registers, shared memory and instructions of the loop are not above what is known of them.

    But for a barrier of 8 bytes, and registers of int4: a step of ours has four times the weights.
    """
    known = {(row.weights, row.kernel, row.target): row for row in rows(record)}
    for peer in PEERS:
        row = known[peer.weights, peer.ours, peer.target]
        assert row.loop <= (peer.loop or row.loop), peer
        assert row.shared <= (peer.shared or row.shared) + 8, peer
        assert row.registers <= peer.registers or peer.weights == "int4", peer


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("shape", [static_gpu.SHAPE, DEEPSEEK_V3], ids=["alone", "shared"])
def test_fusion_moves_less_between_launches(shape: dict[str, int], tokens: int) -> None:
    steps = {name: launches(name, shape, tokens) for name in DECOMPOSITIONS}
    moved = {name: sum(step.bytes for step in found) for name, found in steps.items()}
    assert moved["minimum"] < moved["moecc decode"] < moved["moecc grouped"] < moved["vLLM"]
    assert moved["moecc grouped"] < 1.001 * moved["triton_kernels"]  # ids of 2 bytes, ours of 8
    ours = len(steps["moecc grouped"])
    assert ours < min(len(steps[name]) for name in ("vLLM", "triton_kernels"))


def test_the_page_is_made_of_the_record(record: dict[str, Any]) -> None:
    page = (static_gpu.RECORD.parents[2] / "docs" / "static_gpu.md").read_text()
    if f"Triton {record['triton']};" not in page:
        pytest.skip("the page is of another triton")
    assert page == static_report.page(record)


def test_the_layer_is_the_one_that_is_compiled() -> None:
    spec = static_gpu.make_spec("int4")
    assert (spec.hidden, spec.experts, spec.dtype) == (2048, 128, torch.bfloat16)
    assert str(spec.schemes) == "int4-g32"

"""Benchmarks run: what is timed here is too small to say anything."""

from argparse import Namespace
from dataclasses import fields

import pytest
import torch

from benchmarks import (
    compile_time,
    dispatch,
    kernel_profile,
    kernel_table,
    kernels,
    layer,
    onnx_layer,
    quality_table,
)
from benchmarks.rounding import scheme_bits
from moecc.runtime.schemes.scheme import FP8_BLOCKS, INT8, int4

TINY = {"hidden": 64, "intermediate": 32, "experts": 8, "active": 2}


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_kernels_are_timed_beside_the_roofs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layer.SHAPES, "tiny", TINY)
    arguments = Namespace(shape="tiny", tokens="1,8", seconds=0.001, busy=False)
    rows = list(kernels.measure(kind, arguments))
    ours = {row.tokens: row for row in rows if row.contender == "moecc"}
    assert sorted(ours) == [1, 8]
    for row in rows:
        assert row.of_bandwidth == pytest.approx(
            row.gigabytes * 1e12 / row.milliseconds / row.bandwidth
        )
        assert row.of_products == pytest.approx(
            row.gigaflops * 1e12 / row.milliseconds / row.product_rate
        )
    assert ours[8].gigaflops == 8 * ours[1].gigaflops


def test_dispatch_calls_the_operator_as_it_is() -> None:
    call = dispatch.measure()
    assert 0 < call.kernel < call.call


def test_the_parts_of_a_call_add_up_to_it() -> None:
    # Two threads come to the first meeting at 5 and 9 us, ..., and leave at 80 and 70.
    threads = [[5, 10, 40, 52, 80], [9, 12, 50, 52, 70]]
    times = [1000 * time for thread in threads for time in thread]
    spent = kernel_profile.split(99_000, 0, 82_000, times)
    assert spent.whole == pytest.approx(99)
    assert (spent.around, spent.packing, spent.first, spent.second) == (17, 7, 34, 23)
    assert (spent.waiting, spent.meeting) == (2 + 5 + 5, 2 + 2 + 2)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_a_kernel_is_profiled_by_leaving_things_out(kind: str) -> None:
    shape = {"hidden": 64, "intermediate": 32, "experts": 8, "active": 2}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other tests, calls of all threads may not come
    try:
        profile = kernel_profile.measure(kind, shape, tokens=2, calls=4)
    finally:
        torch.set_num_threads(threads)
    assert 0 < profile.kernel.first < profile.kernel.whole
    assert profile.idle.first < profile.kernel.first
    assert {len(line) for line in kernel_profile.describe([profile])} == {2}


def test_a_table_compares_the_contenders_of_each_cell() -> None:
    times = {"moecc": 2.0, "ggml Q8_0": 3.0, "eager bf16": 9.0, "grouped_mm bf16": 7.0}
    rows = [
        {"kind": "int8", "tokens": 1, "contender": name, "milliseconds": took}
        | {"floor_milliseconds": 1.0}
        for name, took in times.items()
    ]
    rows.append(rows[0] | {"kind": "fp16", "tokens": 8})
    record = {"machine": "a machine", "bandwidth": 30e9, "product_rate": 150e9, "results": rows}
    assert kernel_table.write(record).splitlines() == [
        "a machine; reads 30.0 GB/s, float32 products 150 GFLOP/s (medians over the cells).",
        "",
        "| | T=1 | T=8 |",
        "|---|---:|---:|",
        "| int8 | 2.0 ms, 50%, 1.50x, 3.50x | – |",
        "| fp16 | – | 2.0 ms, 50%, –, – |",
    ]


def test_a_short_group_has_a_scale_of_its_own() -> None:
    assert scheme_bits(int4(), 64) == 4.5
    assert scheme_bits(int4(64, zeros=True), 48) == 4 + 32 / 48
    assert scheme_bits(INT8, 64) == 8.5
    assert scheme_bits(FP8_BLOCKS, 128) == 8 + 32 / 128**2


def test_a_table_has_models_beside_each_other() -> None:
    errors = {"kl_error": 0.001, "change": -0.01, "change_error": 0.002, "agreement": 0.9}
    rows = [
        {"model": model, "family": family, "name": name, "bits": bits, "kl": 0.25} | errors
        for model in ("one", "two")
        for family, name, bits in (("moecc", "int8", 8.5), ("hqq", "4 g64", 4.5))
    ]
    cells = "0.25000 ±0.00100 | -1.00% ±0.20 | 90.0%"
    assert quality_table.write({"rows": rows}).splitlines()[2:] == [
        f"| hqq: 4 g64 | 4.500 | {cells} | 4.500 | {cells} |",
        f"| **int8** | 8.500 | {cells} | 8.500 | {cells} |",
    ]


def test_compile_times_stand_beside_those_of_plain_inductor() -> None:
    spent = {one.name: 2.0 for one in fields(compile_time.Spent)}
    plain, half = (compile_time.Spent(**spent | {"seconds": one}) for one in (2.0, 1.0))
    calls = {"prefill": 0.003, "decode": 0.001, "peak": 0.5, "warm": False, "second": plain}
    rows = [
        compile_time.Row(contender=name, first=first, **calls)
        for name, first in (("inductor", plain), ("moecc", half), ("moecc", half))
    ]
    _, *lines = compile_time.cells(compile_time.median(rows))
    assert [line[:4] for line in lines] == [
        ["inductor, cold", "2.0 (1.00x)", "2.0 (1.00x)", "2.0 + 2.0"],
        ["moecc, cold", "1.0 (0.50x)", "2.0 (1.00x)", "2.0 + 2.0"],
    ]
    assert lines[0][-3:] == ["3.00", "1.00", "0.50"]


def test_a_layer_whose_output_is_another_has_no_time() -> None:
    expected = torch.randn(4, 64)
    calls = {
        "rounded": lambda _: expected * (1 + 1e-6),
        "wrong": lambda _: expected * 1.01,
        "broken": lambda _: expected * float("nan"),
    }
    found = layer.check(calls, expected)
    assert found.keys() == {"wrong", "broken"}
    assert found["wrong"] == "differs from eager by 1.0e-02 of the norm"


@pytest.mark.skipif(not onnx_layer.installed(), reason="needs pip install moecc[onnx]")
def test_onnxruntime_computes_the_same_layer() -> None:
    made = layer.make_layer(TINY, torch.float32)
    run = onnx_layer.build(made.gate_up_proj, made.down_proj, 2, 1)
    for tokens in (1, 9):
        batch = layer.make_inputs(made, tokens)[0]
        with torch.no_grad():
            assert layer.check({"onnxruntime": lambda _, b=batch: run(*b)}, made(*batch)) == {}


QUICK = compile_time.Model(family="qwen3_moe", layers=2, hidden=64, quick=True)


def test_the_parts_of_a_compilation_add_up() -> None:
    row = compile_time.compile_one("moecc", QUICK)
    for spent in (row.first, row.second):
        parts = (spent.dynamo, spent.passes, spent.inner, spent.kernels)
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(spent.seconds)
    assert 0 < row.decode < row.first.seconds


@pytest.mark.slow
def test_compiling_is_timed_in_processes_of_its_own() -> None:
    assert [row.warm for row in compile_time.measure(["moecc"], QUICK, rounds=1)] == [False, True]

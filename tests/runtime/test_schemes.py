"""Low-bit weights: what codes stand for, and how they lie in memory."""

from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.runtime.errors import InputError
from moecc.runtime.schemes import mxfp4
from moecc.runtime.schemes.packing import (
    dequantize,
    nearest,
    pack,
    pack_experts,
    packed_bytes,
    quantize,
    unpack,
    unpack_experts,
)
from moecc.runtime.schemes.scheme import (
    FP8,
    FP8_BLOCKS,
    INT8,
    MXFP4,
    SCHEMES,
    Scheme,
    int4,
)

schemes = pytest.mark.parametrize("scheme", dict.fromkeys(SCHEMES.values()), ids=str)


def steps(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Give half the distance of neighbouring codes for every weight: what rounding may cost."""
    groups = weight.unflatten(1, (-1, scheme.group)) if scheme.group else weight.unsqueeze(1)
    size = groups.abs().amax(-1, keepdim=True)
    if scheme.name == "fp8":
        if scheme.rows > 1:
            size = size.amax(0, keepdim=True)  # 48 rows are one block
        half = torch.maximum(groups.abs() / 16, size / 448 * 2.0**-10)
    elif scheme.name == "int8":
        half = size / 127 / 2
    elif scheme.name == "mxfp4":
        unit = torch.exp2(size.log2().floor() - 2)  # of a group: the last code is 6
        parts = (groups / unit).abs()
        gap = torch.where(parts > 4, 1, torch.where(parts > 2, 0.5, 0.25))
        half = unit * torch.where(parts > 6, parts - 6, gap)
    elif scheme.zeros:
        half = (
            (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True))
            / (2**scheme.bits - 1)
            / (1 if scheme.points else 2)  # whose end codes may be half a step inside the range
        )
    else:
        half = size / 2 ** (
            scheme.bits - 1
        )  # one step: codes end at 7/8 on the side without the largest weight
    return (half.expand_as(groups)).reshape(weight.shape)


@schemes
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e3])
def test_a_weight_is_off_by_at_most_half_a_step(scheme: Scheme, size: float) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(3)) * size
    error = (dequantize(nearest(weight, scheme), scheme) - weight).abs()
    half = weight.abs() * 2.0**-10  # of scales that are rounded to float16
    assert bool((error <= steps(weight, scheme) * 1.01 + half).all())


def matrix(tails: str) -> torch.Tensor:
    """Give weights as they are found: nearly normal, or with outliers."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(64, 512, generator=generator)
    return weight * torch.randn(64, 512, generator=generator).exp() if tails == "heavy" else weight


def squared_error(weight: torch.Tensor, known: torch.Tensor) -> float:
    return float((known - weight).square().sum() / weight.square().sum())


def shrunk(weight: torch.Tensor, known: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Take back the stretch of groups: give each the scale, and the zero, of least squares."""
    if scheme.scale != torch.float16 or scheme.name == "int8":
        return known
    known, wanted = (one.unflatten(1, (-1, scheme.block)) for one in (known, weight))
    zeros = scheme.zeros and not scheme.points
    means = (one.mean(2, True) if zeros else torch.zeros(1) for one in (known, wanted))
    of_known, of_wanted = means
    along, spread = known - of_known, (known - of_known).square().sum(2, True).clamp(min=1e-12)
    best = (along * (wanted - of_wanted)).sum(2, True) / spread
    return (along * best + of_wanted).flatten(1)


@schemes
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_fitted_scales_are_nearer_than_rounding_to_nearest(scheme: Scheme, tails: str) -> None:
    weight = matrix(tails)
    known = dequantize(quantize(weight, scheme), scheme)
    plain = squared_error(weight, dequantize(nearest(weight, scheme), scheme))
    assert squared_error(weight, shrunk(weight, known, scheme)) <= plain * LESS[scheme.name]


@pytest.mark.parametrize("name", ["int2-g64", "int3-g64-zeros", "int4-g32", "int4-g32-points"])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_fitted_codes_reach_as_far_as_their_weights(name: str, tails: str) -> None:
    weight, scheme = matrix(tails), SCHEMES[name]
    along = (dequantize(quantize(weight, scheme), scheme) * weight).sum() / weight.square().sum()
    assert along == pytest.approx(1, abs=1e-3)


LESS = {"int8": 1.0, "fp8": 1.0, "int2": 0.9, "int3": 0.95, "int4": 0.96, "mxfp4": 0.95}
"""Part of the plain error that has to be left at most."""


@schemes
def test_bytes_do_not_depend_on_the_number_of_threads(scheme: Scheme) -> None:
    weight = torch.randn(2, 96, 1500, generator=torch.Generator().manual_seed(1))
    threads, packed = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            packed.append(pack_experts(weight, scheme))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(packed[0], packed[1])
    assert torch.equal(packed[0], packed[2])


@schemes
def test_columns_that_fill_a_block_up_do_not_change_its_scale(scheme: Scheme) -> None:
    block = scheme.block
    weight = matrix("heavy")[:, : 2 * block - block // 2] + 3  # far from the zero of empty columns
    twice = torch.cat([weight, weight[:, block:]], dim=1)  # the half block, again
    alone = dequantize(quantize(weight, scheme), scheme)
    assert torch.equal(alone, dequantize(quantize(twice, scheme), scheme))


@pytest.mark.parametrize("scheme", [int4(), int4(zeros=True)], ids=str)
def test_weights_beyond_the_scales_of_a_scheme_are_refused(scheme: Scheme) -> None:
    weight = torch.randn(16, 64)
    weight[3, 40] = 3e6
    with pytest.raises(InputError, match=r"weights up to 3e\+06 are too large .* of int4-g32"):
        quantize(weight, scheme)


@schemes
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_unpacking_undoes_packing(scheme: Scheme, rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    quantized = quantize(weight, scheme)
    packed = pack(quantized, scheme)
    assert packed.shape == (packed_bytes(rows, columns, scheme),)
    again = unpack(packed, rows, columns, scheme)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.scales, quantized.scales)
    if scheme.zeros:
        assert torch.equal(*(cast(torch.Tensor, one.zeros) for one in (again, quantized)))


@schemes
def test_experts_are_packed_one_by_one(scheme: Scheme) -> None:
    weight = torch.randn(3, 20, 96, dtype=torch.bfloat16)
    packed = pack_experts(weight, scheme)
    unpacked = unpack_experts(packed, (3, 20, 96), scheme)
    for expert in range(3):
        alone = dequantize(quantize(weight[expert], scheme), scheme)
        assert torch.equal(unpacked[expert], alone[:, :96])


@schemes
def test_storage_is_what_the_scheme_says(scheme: Scheme) -> None:
    bits = packed_bytes(1024, 2048, scheme) * 8 / (1024 * 2048)
    assert bits == pytest.approx(scheme.bits_per_weight, abs=0.02)


@schemes
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    weight = torch.zeros(16, 256)
    weight[3] = torch.randn(256)
    got = dequantize(quantize(weight, scheme), scheme)
    assert not got[:3].any()
    assert not got[4:].any()


@schemes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(scheme: Scheme, bad: float) -> None:
    weight = torch.randn(16, 64)
    weight[5, 7] = bad
    with pytest.raises(InputError, match="hold inf or NaN"):
        quantize(weight, scheme)


def test_mxfp4_rounds_to_nearest_and_ties_to_even() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :9] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.1])
    got = dequantize(quantize(weight, MXFP4), MXFP4)[0, :9]
    assert got.tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -6]


@settings(deadline=None)
@given(exponent=st.integers(-126, 120), seed=st.integers(0, 99))
def test_mxfp4_keeps_what_it_can_express(exponent: int, seed: int) -> None:
    codes = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(seed))
    codes[:, ::32] = 7  # 6, so that each group has this exponent
    weight = mxfp4.VALUES[codes] * 2.0**exponent
    assert torch.equal(dequantize(quantize(weight, MXFP4), MXFP4), weight)


def test_groups_that_kernels_lack_are_named() -> None:
    with pytest.raises(InputError, match="32, 64 or 128 weights, not 48"):
        int4(48)


def test_names() -> None:
    assert str(int4(64, zeros=True)) == "int4-g64-zeros"
    assert [str(one) for one in (FP8, FP8_BLOCKS, SCHEMES["int2"])] == [
        "fp8",
        "fp8-b128",
        "int2-g32",
    ]
    assert (str(INT8), str(MXFP4)) == ("int8", "mxfp4")

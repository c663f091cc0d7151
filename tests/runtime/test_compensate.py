"""Codes that make up for each other's errors, by what inputs have in common."""

import pytest
import torch

from moecc.runtime.schemes.packing import dequantize, quantize
from moecc.runtime.schemes.scheme import INT8, MXFP4, Scheme, grouped, int4


def case(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give a matrix and inputs that lie near a quarter of as many directions."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, columns, generator=generator)
    directions = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(512, columns // 4, generator=generator) @ directions
    return weight, inputs + 0.3 * torch.randn(512, columns, generator=generator)


def error(weight: torch.Tensor, inputs: torch.Tensor, scheme: Scheme, given: torch.Tensor) -> float:
    known = dequantize(quantize(weight, scheme, given), scheme)[:, : weight.shape[1]]
    return float((inputs @ (known - weight).T).square().sum())


@pytest.mark.parametrize(
    "scheme", [int4(), int4(64, zeros=True), int4(points=True), grouped("int3", 64)], ids=str
)
@pytest.mark.parametrize("columns", [256, 144])  # more than one part; rows that fill no group
def test_products_come_nearer_than_with_the_diagonal(scheme: Scheme, columns: int) -> None:
    weight, inputs = case(columns)
    hessian = inputs.T @ inputs
    by_column = error(weight, inputs, scheme, hessian.diagonal())
    assert error(weight, inputs, scheme, hessian) < 0.6 * by_column


def test_inputs_with_nothing_in_common_are_rounded_to_nearest() -> None:
    weight, _ = case(128)
    got = quantize(weight, int4(), torch.eye(128) * 5)
    steps = weight.unflatten(1, (-1, 32)) / got.scales.float().unsqueeze(2)
    assert torch.equal(got.codes, (steps.round() + 8).clamp(0, 15).to(torch.uint8).flatten(1))


@pytest.mark.parametrize("scheme", [INT8, MXFP4], ids=str)
def test_other_schemes_weigh_columns_alone(scheme: Scheme) -> None:
    weight, inputs = case(128)
    hessian = inputs.T @ inputs
    got, want = (quantize(weight, scheme, one) for one in (hessian, hessian.diagonal()))
    assert torch.equal(got.codes, want.codes)


def test_groups_of_zeros_stay_zeros() -> None:
    weight, inputs = case(128)
    weight[:, 32:64] = 0
    weight[3] = 0
    known = dequantize(quantize(weight, int4(), inputs.T @ inputs), int4())
    assert not known[:, 32:64].any()
    assert known.isfinite().all()

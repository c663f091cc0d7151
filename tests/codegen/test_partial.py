"""`Kernel.add`: some experts at a time, from slots, with the bits of one call."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.codegen import reference
from moecc.codegen.native.emit import emit
from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError
from moecc.runtime.schemes.packing import pack_experts
from moecc.runtime.schemes.scheme import SCHEMES, Schemes
from tests.codegen.native_cases import DTYPES, STYLES, make_batch, make_experts, make_spec

EMITTERS = {"native": emit, "torch": reference.emit}


def add_in_groups(
    kernel: Any, batch: Any, weights: Any, groups: list[list[int]], apart: int = 0
) -> torch.Tensor:
    """Add group by group, each from slots in random order that only it fills."""
    spec: KernelSpec = kernel.spec
    onto = torch.zeros(batch[0].shape, dtype=torch.promote_types(spec.dtype, torch.float32))
    first, second, *biases, up, learned = weights
    for group in groups:
        count = len(group) + 1  # one that nobody uses
        places = torch.randperm(count)[: len(group)]
        slots = torch.full((spec.experts,), -1)
        slots[group] = places
        held = [_in_slots(one, group, places, count, apart) for one in (first, second, up)]
        kernel.add(onto, slots, *batch, held[0], held[1], *biases, held[2], learned)
    return onto.to(batch[0].dtype)


def _in_slots(
    weight: torch.Tensor | None, group: list[int], places: torch.Tensor, count: int, apart: int
) -> torch.Tensor | None:
    """Copy experts to slots that lie `apart` elements from one another; the rest is NaN."""
    if weight is None:
        return None
    size = weight[0].numel()
    bad = torch.nan if weight.is_floating_point() else 255
    memory = torch.full((count, size + apart), bad, dtype=weight.dtype)
    slots = memory[:, apart:].unflatten(1, weight.shape[1:])
    slots[places] = weight[group]
    return slots


def split(experts: int, cuts: set[int]) -> list[list[int]]:
    """Cut 0..E-1 into ascending groups."""
    ends = [*sorted(cut for cut in cuts if 0 < cut < experts), experts]
    return [list(range(a, b)) for a, b in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("emitter", EMITTERS)
@pytest.mark.parametrize("style", STYLES)
def test_any_split_has_the_bits_of_one_call(emitter: str, style: str) -> None:
    for dtype in DTYPES:
        spec = make_spec(style, dtype, experts=6)
        kernel = EMITTERS[emitter](spec)

        @settings(max_examples=8, deadline=None, derandomize=True)
        @given(
            cuts=st.sets(st.integers(1, 5)),
            tokens=st.sampled_from([0, 1, 3, 64]),
            # torch's own products have other bits where weights are aligned otherwise
            apart=st.sampled_from([0, 3, 64] if emitter == "native" else [0, 64]),
        )
        def check(cuts: set[int], tokens: int, apart: int) -> None:
            batch, weights = make_batch(spec, tokens, 2), make_experts(spec)  # noqa: B023
            whole = kernel.run(*batch, *weights)  # noqa: B023
            groups = split(6, cuts)
            assert torch.equal(add_in_groups(kernel, batch, weights, groups, apart), whole)  # noqa: B023

        check()


def test_packed_weights_too() -> None:
    plain = make_spec("split", torch.float32, experts=5, h=64, i=64)
    for name in ("int8", "int4"):
        scheme = SCHEMES[name]
        spec = replace(plain, schemes=Schemes(first=scheme, second=scheme), dtype=torch.bfloat16)
        batch = make_batch(spec, 5, 2)
        first, second, *biases, up, _ = make_experts(plain)
        packed = [
            pack_experts(one, SCHEMES[name]) for one in (first, second, up) if one is not None
        ]
        biases = [one if one is None else one.bfloat16() for one in biases]
        weights = [packed[0], packed[1], *biases, packed[2], None]
        kernel = emit(spec)
        whole = kernel.run(*batch, *weights)
        for groups in (split(5, {2}), split(5, {1, 2, 3, 4})):
            assert torch.equal(add_in_groups(kernel, batch, weights, groups, 64), whole)


@pytest.mark.parametrize("emitter", EMITTERS)
def test_experts_without_a_slot_contribute_nothing(emitter: str) -> None:
    spec = make_spec("silu", torch.float32)
    kernel = EMITTERS[emitter](spec)
    (hidden, ids, scores), weights = make_batch(spec, 7, 2), make_experts(spec)
    ids[0] = torch.tensor([-1, spec.experts])
    ids[1] = 1 << 40
    onto = torch.full(hidden.shape, 3.0)
    kernel.add(onto, torch.full((spec.experts,), -1), hidden, ids, scores, *weights)
    assert (onto == 3).all()
    kernel.add(onto, torch.tensor([-1, 1, -5, -1]), hidden, ids, scores, *weights)
    only = torch.where(ids == 1, scores, 0)
    torch.testing.assert_close(onto - 3, kernel.run(hidden, ids, only, *weights))


def test_bad_slots_and_sums_are_named() -> None:
    spec = make_spec("silu", torch.float32)
    (hidden, ids, scores), weights = make_batch(spec, 5, 2), make_experts(spec)
    add: Any = emit(spec).add
    onto, slots = torch.zeros(5, spec.hidden), torch.arange(4)
    for bad in (
        onto[:4], onto.double(), onto.T.contiguous().T, torch.zeros(5, 2 * spec.hidden)[:, ::2],
        onto.to("meta"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"onto is .*expected contiguous torch.float32"):
            add(bad, slots, hidden, ids, scores, *weights)
    for bad in (slots[:3], slots.int(), torch.arange(8)[::2], slots.to("meta")):
        with pytest.raises(InputError, match=r"slots is .*expected contiguous torch.int64"):
            add(onto, bad, hidden, ids, scores, *weights)
    with pytest.raises(InputError, match=r"slots name slot 4 and weights have 4 slots"):
        add(onto, slots + 1, hidden, ids, scores, *weights)  # the last lies behind the weights
    assert not onto.any()
    held = [one if one is None else one[:3] for one in weights]
    with pytest.raises(InputError, match=r"down is .*expected"):
        add(onto, torch.tensor([0, 1, 2, -1]), hidden, ids, scores, held[0], *weights[1:])

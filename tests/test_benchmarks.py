"""Benchmarks run: what is timed here is too small to say anything."""

from argparse import Namespace

import pytest

from benchmarks import dispatch, kernels, layer


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_kernels_are_timed_beside_the_roofs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden": 64, "intermediate": 32, "experts": 8, "active": 2}
    monkeypatch.setitem(layer.SHAPES, "tiny", shape)
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

"""The plot of `benchmarks.kernels`."""

import sys
from pathlib import Path

import pytest

from benchmarks import roofline
from moecc.runtime.errors import MissingExtra


def result(contender: str, kind: str, tokens: int) -> dict[str, object]:
    work = {"gigabytes": 0.01, "gigaflops": 0.02 * tokens, "milliseconds": 2.0 * tokens}
    return {"contender": contender, "kind": kind, "tokens": tokens, **work}


RECORD = {
    "machine": "a machine",
    "shape": "small",
    "bandwidth": 30e9,
    "product_rate": 150e9,
    "results": [
        result(contender, kind, tokens)
        for kind, contenders in {
            "bf16": ["moecc", "ggml BF16", "eager bf16"],
            "int4": ["moecc", "ggml Q4_0", "eager bf16"],
        }.items()
        for contender in contenders
        for tokens in (1, 8, 64)
    ],
}


def test_draws_each_contender_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "roofline.svg"
    roofline.draw(RECORD, file)
    drawn = file.read_text()
    for label in ("moecc bf16", "moecc int4", "ggml BF16", "ggml Q4_0", "eager bf16", "a machine"):
        assert drawn.count(f"<!-- {label} -->") == 1


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install moecc\[plot\]"):
        roofline.draw(RECORD, tmp_path / "roofline.svg")

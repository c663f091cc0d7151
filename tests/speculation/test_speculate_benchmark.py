"""What times, simulates and bounds drafts runs: small settings, which say nothing about speed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import speculate, speculate_bound, speculate_paper
from benchmarks.speculate_table import K0

SMALL = {
    "memory": "75%", "link": "400", "text": "novel", "depths": "2", "new-tokens": "8",
    "rounds": "1", "widen": "1", "inner": "none",
}  # fmt: skip


@pytest.mark.parametrize(("draft", "corrupt"), [("cached", 100), ("int8", 0)])
def test_the_sweep_times_every_depth_and_judges_auto(
    draft: str, corrupt: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speculate.json"
    given = SMALL | {"store": tmp_path, "json": file, "draft": draft, "corrupt": corrupt}
    speculate.main([f"--{name}={value}" for name, value in given.items()])
    rows = json.loads(file.read_text())["results"]
    assert [row["contender"] for row in rows] == ["lru", "lfu", K0, "k=2", "auto"]
    assert all(row["tied"] for row in rows)
    assert (rows[3]["accepted"] < 0.1) == (corrupt == 100)
    assert (rows[3]["slots"] < 24) == (draft == "int8")
    for row in rows:
        assert sum(row["milliseconds"].values()) == pytest.approx(
            (8 - 1) / 8 * 1e3 / row["tokens_per_second"]
        )
    assert "auto is within 5 % of the best depth in" in capsys.readouterr().out


def test_the_paper_is_predicted_by_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate_paper, "DEPTHS", (2,))
    monkeypatch.setattr(speculate_paper, "TOKEN", 0.5)
    phi = replace(speculate_paper.SETUPS[0], layers=2, used=0.5e9)
    found = speculate_paper.predict(phi, 12)
    assert [one.paper for one in found] == 2 * [536.7, 351.8, 163.1, None]
    least, same, drafts, perfect = (one.predicted for one in found[:4])
    assert same < least
    assert perfect < drafts
    reads = phi.layers * phi.active * phi.size / 16e9 * 1e3  # milliseconds, were nothing cached
    assert 0.5 * reads < least < 1.2 * reads


def test_a_bound_is_above_what_lru_does() -> None:
    torch.manual_seed(0)
    chosen = [torch.rand(40, speculate_bound.EXPERTS).topk(4).indices for _ in range(2)]
    bound = speculate_bound.bound(speculate_bound.record(chosen), slots=16, ratio=2.0)
    assert bound.oracle > 1
    assert bound.free > bound.perfect > bound.copies
    assert bound.free > bound.cached

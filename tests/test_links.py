"""Links with a compiler and without."""

from pathlib import Path

import pytest
import torch

from moecc import links
from moecc.runtime.errors import NoCompiler
from tests.runtime.offload.stores import fetch, write_store


def test_without_a_compiler_python_reads_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = write_store(tmp_path)
    native = links.new_link()

    def missing() -> None:
        raise NoCompiler("no C++ compiler works here")

    said: list[str] = []
    monkeypatch.setattr(links, "load_readers", missing)
    monkeypatch.setattr(links._log, "warning", lambda text, *of: said.append(text % of))
    python = links.new_link()
    assert (native.readers, python.readers) == ("native", "python")
    assert said == ["experts are read by Python threads: no C++ compiler works here"]
    for link in (native, python):
        assert torch.equal(fetch(link, store, 1), data[1])
        link.close()

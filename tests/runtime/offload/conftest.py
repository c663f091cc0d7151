"""A link whose tests leave nothing behind."""

from collections.abc import Iterator

import pytest

from moecc.runtime.offload import load as load_module
from moecc.runtime.offload.link import Link
from tests.runtime.offload.stores import open_files, readers


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """A link with one reader and small chunks, which leaves nothing behind."""
    monkeypatch.setattr(load_module, "CHUNK", 2048)  # three to an expert
    before = open_files(), len(readers())
    made = Link(readers=1)
    yield made
    made.close()
    assert (open_files(), len(readers())) == before

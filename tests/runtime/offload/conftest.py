"""Links whose tests leave nothing behind."""

from collections.abc import Iterator

import pytest

from moecc.runtime.offload import load as load_module
from moecc.runtime.offload.link import Link, NewReaders
from tests.runtime.offload.stores import KINDS, open_files, readers


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> NewReaders:
    """The queue of readers in Python, and the one in C++."""
    return KINDS[request.param]


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch, kind: NewReaders) -> Iterator[Link]:
    """A link with one reader and small chunks, which leaves nothing behind."""
    monkeypatch.setattr(load_module, "CHUNK", 2048)  # three to an expert
    before = open_files(), len(readers())
    made = Link(1, new=kind)
    yield made
    made.close()
    assert (open_files(), len(readers())) == before

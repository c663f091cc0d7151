"""Fixtures that every test may use."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; no test needs a network

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bless", action="store_true", help="rewrite the golden files")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with tests/golden/<file>/<test>.txt; `pytest --bless` rewrites it."""
    node = request.node
    path = GOLDEN / node.path.stem / f"{node.name}.txt"

    def check(text: str) -> None:
        if request.config.getoption("--bless"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"no golden {path}; run pytest --bless and review it"
        assert text == path.read_text(), "differs from its golden; pytest --bless if that is right"

    return check

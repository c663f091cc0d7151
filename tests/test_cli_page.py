"""docs/cli.md says what the commands are."""

from pathlib import Path

import pytest

from tests.cli_page import page

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"


def test_the_page_is_what_the_commands_say(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--bless"):
        PAGE.write_text(page())
    assert page() == PAGE.read_text(), "run pytest tests/test_cli_page.py --bless, and review it"

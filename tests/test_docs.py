"""The site says what the code says, and leads somewhere."""

import re
from pathlib import Path

import pytest

from moecc.passes.pipeline import PIPELINE
from moecc.runtime import errors

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = {"index.md", "options.md", "passes.md", "extending.md"}
PAGES = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def test_every_error_says_what_to_do_about_it() -> None:
    raised = {
        name
        for name, one in vars(errors).items()
        if isinstance(one, type) and issubclass(one, errors.MoeccError)
    } - {"MoeccError"}
    text = (DOCS / "troubleshooting.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n\n(.+?)(?=\n###|\Z)", text, re.DOTALL | re.MULTILINE))
    assert set(sections) == raised
    assert all(len(told) > 60 for told in sections.values())


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert f": {page.name}" in nav
    for page in PAGES:
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
        for link in links:
            assert (page.parent / link).exists() or link in GENERATED, f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_are_there(page: Path) -> None:
    named = re.findall(
        r"`((?:passes|codegen|runtime|tests|docs|benchmarks)/[\w/]+\.\w+)`", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_walk_goes_through_every_pass_in_order_and_shows_goldens() -> None:
    text = (DOCS / "how_it_works.md").read_text()
    shown = re.findall(r'--8<-- "(.+)"', text)
    assert len(shown) >= 8
    assert all((ROOT / name).is_file() for name in shown)
    headings = ", ".join(re.findall(r"^## (.+)$", text, re.MULTILINE)).split(", ")
    assert [name for name in headings if "_" in name or name == "lower"] == [
        one.__name__ for one in PIPELINE
    ]


def test_generated_pages_have_every_pass_and_option() -> None:
    pytest.importorskip("mkdocs", reason="the site needs pip install moecc[docs]")
    import importlib.util

    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    passes = generate.passes()
    assert [one.__name__ for one in PIPELINE] == re.findall(
        r"^## \d+\. (\w+)$", passes, re.MULTILINE
    )
    assert "## `quantize`" in generate.options()
    assert "[benchmarks](benchmarks.md)" in generate.from_root("README.md")

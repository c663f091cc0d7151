"""Write the pages of the site that say what the code says: mkdocs calls this when it builds.

README and CONTRIBUTING become pages, options come from their dataclass and the README's table,
passes from their docstrings.
"""

import re
from dataclasses import fields
from inspect import getdoc, getmodule
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from moecc.passes.options import Options
from moecc.passes.pipeline import PIPELINE

ROOT = Path(__file__).parent.parent
_ROW = re.compile(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add every decision to the navigation, by its own title."""
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    listed = [{_title(page): f"decisions/{page.name}"} for page in pages]
    assert config.nav is not None
    config.nav.append({"Decisions": listed})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are generated."""
    made = {
        "index.md": from_root("README.md"),
        "extending.md": from_root("CONTRIBUTING.md"),
        "options.md": options(),
        "passes.md": passes(),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def _title(page: Path) -> str:
    return page.read_text().splitlines()[0].removeprefix("#").strip()


def from_root(name: str) -> str:
    """Take a page from the root of the repository: links into `docs/` are links beside it."""
    text = (ROOT / name).read_text()
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"`docs/(\w+)\.md`", r"[\1](\1.md)", text)


def options() -> str:
    """List the dataclass's fields with its defaults, and what the README says about each.

    Raises `KeyError` for an option that the README's table does not have.
    """
    told = {name: rest for name, *rest in _ROW.findall((ROOT / "README.md").read_text())}
    parts = [
        '# Options\n\nOf `torch.compile(model, backend="moecc", options={...})`, `moecc.load` and '
        "`moecc.offload`. Unknown options and bad values raise `OptionError`.\n"
    ]
    for one in fields(Options):
        values, _, meaning = told[one.name]
        told_of = f"{meaning[0].upper()}{meaning[1:]}.\n\nValues: {values}"
        parts.append(f"## `{one.name}`\n\n{told_of}. Default: `{one.default!r}`.\n")
    return "\n".join(parts)


def passes() -> str:
    """Show each pass's docstring, in the order in which they run."""
    parts = ["# Passes\n\nIn the order in which they run.\n"]
    for number, one in enumerate(PIPELINE, 1):
        text = getdoc(getmodule(one))
        parts.append(f"## {number}. {one.__name__}\n\n{text}\n")
    return "\n".join(parts).replace("\n→\n", "\n\n→\n\n")

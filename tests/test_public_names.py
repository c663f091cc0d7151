import ast
import importlib
from pathlib import Path

import moecc

ROOT = Path(__file__).parent.parent
FLOORS = ("moecc", "moecc.passes", "moecc.codegen", "moecc.runtime")
"""From the roof down; imports go down only."""


def test_public_names_are_listed_and_resolve() -> None:
    for name in moecc.__all__:
        assert getattr(moecc, name).__doc__


def test_importing_the_reports_module_does_not_hide_the_function() -> None:
    importlib.import_module("moecc.reporting")
    assert callable(moecc.report)


def floor_of(module: str) -> int:
    matches = [
        i for i, floor in enumerate(FLOORS) if module == floor or module.startswith(f"{floor}.")
    ]
    return max(matches)


def imports_of(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] == "moecc"}


def test_imports_go_down_only() -> None:
    upward = [
        (f"{folder}/{file.name}", name)
        for floor, folder in enumerate(("moecc", "passes", "codegen", "runtime"))
        for file in (ROOT / folder).glob("**/*.py")
        for name in imports_of(file)
        if floor_of(name) < floor
    ]
    assert not upward

"""The errors of the harness, and the check of tables that people write."""

from collections.abc import Mapping, Set
from dataclasses import MISSING, fields
from typing import Any


class ScenarioError(ValueError):
    """A file of scenarios says something that the harness cannot do."""


def check_keys(
    table: Mapping[str, Any], of: type, where: str, given: Set[str] = frozenset()
) -> None:
    """Raise `ScenarioError` unless a table has the fields of a dataclass, but those `given`."""
    allowed = {one.name: one for one in fields(of) if one.name not in given}
    if unknown := table.keys() - allowed.keys():
        raise ScenarioError(
            f"{where} has unknown keys {sorted(unknown)}; there are {sorted(allowed)}"
        )
    needed = {
        name
        for name, one in allowed.items()
        if one.default is MISSING and one.default_factory is MISSING
    }
    if missing := needed - table.keys():
        raise ScenarioError(f"{where} lacks {sorted(missing)}")

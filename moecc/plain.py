"""Turn results into what JSON has: the one rule behind every `--json`."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast


def plain(value: Any) -> Any:
    """Give dicts, lists, numbers and strings; a dataclass has its fields, then its properties."""
    if is_dataclass(value):
        return {name: plain(getattr(value, name)) for name in members(type(value))}
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return {str(key): plain(one) for key, one in pairs}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in cast("list[Any]", value)]
    return value


def members(kind: type) -> list[str]:
    """Name the fields and properties of a dataclass, in the order of its source."""
    known = [name for name, one in vars(kind).items() if isinstance(one, property)]
    return [*(field.name for field in fields(kind)), *known]

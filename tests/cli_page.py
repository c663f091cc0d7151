"""Write docs/cli.md: every command's usage from typer, and its JSON from the classes behind it."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from moecc import (
    bench_cli,
    cli,
    demo,
    inspection,
    kernel_plans,
    offload_demo,
    packing,
    planning,
    reasons,
    replaying,
    tracing,
)
from moecc.doctor import examine
from moecc.plain import members
from moecc.report_html import report
from moecc.runtime.offload import profile

RESULTS: dict[str, Any] = {
    "passes": inspection.Inspected | inspection.Diff,
    "why": tuple[reasons.Answer, ...],
    "kernels": list[kernel_plans.KernelPlans],
    "plan": planning.Plan,
    "run": demo.Demo | offload_demo.OffloadDemo,
    "trace": tracing.Traced,
    "replay": replaying.Replayed,
    "profile": profile.Profile,
    "pack": packing.Packed,
    "doctor": examine.Examined,
    "report": report.Told,
    "bench": list[bench_cli.Benchmark],
}
"""What each command prints with `--json`: `moecc.plain` says how."""
_HEAD = """# Command line

Written by `pytest tests/test_cli_page.py --bless`. Exit status: 0 fine, 1 a problem was found,
2 wrong use, 130 stopped with Ctrl-C. Results go to stdout, all else to stderr; colours and progress
are for terminals alone, and `NO_COLOR` is kept to. `moecc --install-completion` teaches the shell
model types, passes, schemes and targets.

With `--json` a command prints the fields and properties of the classes below, by these names;
classes are under *JSON*, after the commands.
"""


def page() -> str:
    """Write the whole page."""
    group: Any = get_command(cli.app)
    context = typer.Context(group, info_name="moecc")
    parts = [_HEAD]
    for name, command in group.commands.items():
        text = get_docs_for_click(obj=command, ctx=context, name=name, call_prefix="moecc")
        parts.append(re.sub(r"\[b\](.*?)\[/b\]", r"`\1`", text.strip()).replace("# ", "## ", 1))
        if name in RESULTS:
            parts.append(f"**JSON**: {_name(RESULTS[name])}")
    parts.append("## JSON")
    parts += [_table(one) for one in dict.fromkeys(_classes(list(RESULTS.values())))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(kind: type) -> str:
    about = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
    rows = [f"### {kind.__name__}", "", about, "", "| name | type | |", "|---|---|---|"]
    said = docstrings(kind)
    rows += [
        f"| `{name}` | {_name(one)} | {said.get(name, '')} |" for name, one in hints(kind).items()
    ]
    return "\n".join(rows)


def hints(kind: type) -> dict[str, Any]:
    """Give the types of a dataclass's fields and properties, as JSON has them."""
    known = typing.get_type_hints(kind)
    return {
        name: known[name]
        if name in known
        else typing.get_type_hints(inspect.getattr_static(kind, name).fget)["return"]
        for name in members(kind)
    }


@functools.cache
def docstrings(kind: type) -> dict[str, str]:
    """Read what stands below the fields of a class, and in its properties."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for before, one in zip([None, *body.body], body.body, strict=False):
        if isinstance(one, ast.FunctionDef):
            found[one.name] = ast.get_docstring(one) or ""
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(one, ast.Expr)
            and isinstance(one.value, ast.Constant)
        ):
            assert isinstance(before.target, ast.Name)
            found[before.target.id] = inspect.cleandoc(one.value.value)
    return {name: " ".join(text.split()) for name, text in found.items()}


def _classes(kinds: list[Any]) -> Iterator[type]:
    """Walk the dataclasses in some types, outer ones first."""
    for kind in kinds:
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield kind
            yield from _classes(list(hints(kind).values()))
        else:
            yield from _classes(list(typing.get_args(kind)))


def _name(kind: Any) -> str:
    """Name a type as JSON knows it, with links to classes."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_name, args))
    if origin is typing.Literal:
        return " or ".join(f"`{one}`" for one in args)
    if origin is tuple and args[-1] is not ...:
        return f"array of {len(args)} {_name(args[0])}"
    if origin in (tuple, list):
        return f"array of {_name(args[0])}"
    if origin is dict:
        return "object" if args[1] is Any else f"object of {_name(args[1])}"
    names = {str: "string", bool: "boolean", int: "integer", float: "number", Any: "any"}
    return "null" if kind is type(None) else names[kind]


def check(value: Any, kind: Any, where: str = "") -> None:
    """Assert that a JSON value is what the page says of its type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        known = hints(kind)
        assert list(value) == list(known), where
        for name, one in known.items():
            check(value[name], one, f"{where}.{name}")
            _check_told(value[name], one, docstrings(kind).get(name, ""), f"{where}.{name}")
    elif origin in (types.UnionType, typing.Union):
        fits = [one for one in args if _fits(value, one)]
        assert fits, f"{where}: {value!r} is not {_name(kind)}"
        check(value, fits[0], where)
    elif origin in (tuple, list):
        assert isinstance(value, list), where
        for number, one in enumerate(value):
            check(one, args[0] if args[-1] is ... or origin is list else args[number], where)
    elif origin is dict and args[1] is not Any:
        for name, one in value.items():
            check(one, args[1], f"{where}.{name}")
    else:
        assert _fits(value, kind), f"{where}: {value!r} is not {_name(kind)}"


def _fits(value: Any, kind: Any) -> bool:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return isinstance(value, dict) and list(value) == list(hints(kind))
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    kind = typing.get_origin(kind) or kind
    return kind is Any or isinstance(value, list if kind is tuple else kind)


def _check_told(value: Any, kind: Any, told: str, where: str) -> None:
    """Assert that the docstring of free-form objects names what they have."""
    if "dict[str, typing.Any]" not in str(kind):
        return
    for one in value if isinstance(value, list) else [value]:
        untold = [name for name in one or () if not re.search(rf"\b{name}\b", told)]
        assert not untold, f"{where} has {untold}, which its docstring does not name"

"""Read the graphs that `moecc.passes.text` prints: what a person reads is what is drawn.

%out = moecc.experts(%hidden, %ids, @experts.up)  # f32[T, 64]  model.layers.0.mlp.experts

A graph that others call comes after them, below a line with its name and a colon.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

_QUOTED = re.compile(r"'[^']*'")
_VALUE = re.compile(r"%\w+|@[\w.]+")
_CALLEE = re.compile(r"^\n(\w+):\n", re.MULTILINE)
_COMMENT = re.compile(r"(?P<made>\w+\[.*?\])?\s*(?P<path>\S*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A node as it is printed."""

    name: str
    """`%hidden`, or `@model.norm.weight` for what the model owns, or `return`; in a graph that
    others call `layer:%hidden`."""
    target: str
    """What is called, without arguments: `linear`, `.view`, `moecc.experts`, `placeholder`."""
    made: str
    """dtype and shape, or nothing."""
    path: str
    """The innermost module around it."""
    inputs: tuple[str, ...]
    """Names, each once."""
    text: str
    body: tuple["Line", ...] = ()
    """Of a call of another graph, that graph."""

    @property
    def printed(self) -> str:
        """Give the name as it is in the text."""
        return self.name.rpartition(":")[2]

    @property
    def is_input(self) -> bool:
        """Tell whether nothing is computed: an argument, or a tensor of the model."""
        return self.target == "placeholder"


def parse(text: str) -> tuple[Line, ...]:
    """Read a graph's text, a node a line."""
    main, *others = _CALLEE.split(text)
    bodies: dict[str, tuple[Line, ...]] = {}
    for name, body in zip(others[::2], others[1::2], strict=True):
        bodies[name] = tuple(_line(line, f"{name}:") for line in filter(None, body.splitlines()))
    lines = map(_line, filter(None, main.splitlines()))
    return tuple(replace(line, body=bodies.get(line.target, ())) for line in lines)


def with_bodies(lines: Iterable[Line]) -> tuple[Line, ...]:
    """List nodes, and once each those of the graphs that they call."""
    bodies = dict.fromkeys(line.body for line in lines)
    return (*lines, *(line for body in bodies for line in body))


def _line(text: str, scope: str = "") -> Line:
    if text.startswith("return "):
        code, comment, name, call = text, "", "return", text
    else:
        code, _, comment = text.partition("  # ")
        name, _, call = code.partition(" = ")
    found = _COMMENT.match(comment)
    return Line(
        name=_scoped(name, scope),
        target=name if call is text else call.partition("(")[0],
        made=(found["made"] or "") if found else "",
        path=found["path"] if found else "",
        inputs=tuple(
            _scoped(one, scope) for one in dict.fromkeys(_VALUE.findall(_QUOTED.sub("", call)))
        ),
        text=text,
    )


def _scoped(name: str, scope: str) -> str:
    """Tell values of several graphs apart; what the model owns is the same in all."""
    return name if name.startswith("@") else scope + name


def changed(lines: tuple[Line, ...], others: tuple[Line, ...]) -> frozenset[str]:
    """Name the nodes that are not the same in another graph; names of what they read may differ."""
    theirs = {_compared(line) for line in with_bodies(others)}
    return frozenset(
        line.name
        for line in with_bodies(lines)
        if not line.is_input and line.target != "return" and _compared(line) not in theirs
    )


def _compared(line: Line) -> tuple[str, str]:
    return line.printed, _VALUE.sub("%", line.text)

"""Read the graphs that `moecc.passes.text` prints: what a person reads is what is drawn.

%out = moecc.experts(%hidden, %ids, @experts.up)  # f32[T, 64]  model.layers.0.mlp.experts
"""

import re
from dataclasses import dataclass

_QUOTED = re.compile(r"'[^']*'")
_VALUE = re.compile(r"%\w+|@[\w.]+")
_COMMENT = re.compile(r"(?P<made>\w+\[.*?\])?\s*(?P<path>\S*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A node as it is printed."""

    name: str
    """`%hidden`, or `@model.norm.weight` for what the model owns, or `return`."""
    target: str
    """What is called, without arguments: `linear`, `.view`, `moecc.experts`, `placeholder`."""
    made: str
    """dtype and shape, or nothing."""
    path: str
    """The innermost module around it."""
    inputs: tuple[str, ...]
    """Names, each once."""
    text: str

    @property
    def is_input(self) -> bool:
        """Tell whether nothing is computed: an argument, or a tensor of the model."""
        return self.target == "placeholder"


def parse(text: str) -> tuple[Line, ...]:
    """Read a graph's text, a node a line."""
    return tuple(map(_line, filter(None, text.splitlines())))


def _line(text: str) -> Line:
    if text.startswith("return "):
        code, comment, name, call = text, "", "return", text
    else:
        code, _, comment = text.partition("  # ")
        name, _, call = code.partition(" = ")
    found = _COMMENT.match(comment)
    return Line(
        name=name,
        target=name if call is text else call.partition("(")[0],
        made=(found["made"] or "") if found else "",
        path=found["path"] if found else "",
        inputs=tuple(dict.fromkeys(_VALUE.findall(_QUOTED.sub("", call)))),
        text=text,
    )


def changed(lines: tuple[Line, ...], others: tuple[Line, ...]) -> frozenset[str]:
    """Name the nodes that are not the same in another graph; names of what they read may differ."""
    theirs = {line.name: _VALUE.sub("%", line.text) for line in others}
    return frozenset(
        line.name
        for line in lines
        if not line.is_input
        and line.name != "return"
        and theirs.get(line.name) != _VALUE.sub("%", line.text)
    )

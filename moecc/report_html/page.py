"""Put sections into one page that needs nothing from anywhere else."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

_TIP = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
    'orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs></svg>\n'
)
"""The head of all arrows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page."""

    key: str
    """Its id."""
    title: str
    html: str


def page(title: str, about: str, sections: Sequence[Section], data: dict[str, Any]) -> str:
    """Write the whole file; `data` is what the script reads."""
    here = files("moecc.report_html")
    style = here.joinpath("style.css").read_text(encoding="utf-8")
    script = here.joinpath("script.js").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{one.key}">{escape(one.title)}</a>' for one in sections)
    body = "".join(
        f'<section id="{one.key}"><h2>{escape(one.title)}</h2>{one.html}</section>'
        for one in sections
    )
    plain = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag begins in it
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>\n{style}</style></head>\n'
        f"<body><header><h1>{escape(title)}</h1><p>{escape(about)}</p><nav>{links}</nav></header>"
        f"\n<main>{body}</main>\n{_TIP}"
        f'<script type="application/json" id="data">{plain}</script>'
        f"<script>\n{script}</script></body></html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a table; columns of numbers stand right."""
    right = [
        all(map(_is_number, cells)) and any(cells)
        for cells in ([str(row[at]) for row in rows] for at in range(len(heads)))
    ]

    def row(tag: str, cells: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=n' if end else ''}>{escape(str(cell))}</{tag}>"
            for cell, end in zip(cells, right, strict=True)
        )

    lines = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    head = f"<thead><tr>{row('th', heads)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{lines}</tbody></table></div>'


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text in ("–", "")


def details(summary: str, html: str, is_open: bool = False) -> str:
    """Write what is folded away until somebody wants it."""
    return f"<details{' open' * is_open}><summary>{escape(summary)}</summary>{html}</details>"


def command(line: str, why: str) -> str:
    """Write the command that gives what is not there."""
    return f'<p class="command">{escape(why)} <code>{escape(line)}</code></p>'


def tiles(entries: Sequence[tuple[str, object, str]]) -> str:
    """Write figures that are read first: what, how many, and a class for those that are bad."""
    return (
        '<dl class="tiles">'
        + "".join(
            f'<div class="{kind}"><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>'
            for name, value, kind in entries
        )
        + "</dl>"
    )

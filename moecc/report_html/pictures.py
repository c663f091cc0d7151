"""Draw what a group opens to: boxes of its members, and the edges between them, as SVG."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from moecc.report_html.grouping import Group, Member, Op
from moecc.report_html.layered import Layout, place
from moecc.report_html.listing import Line

_LETTER = 6.7
"""Width of a letter of the pictures' font (11 px, monospaced) and a little more."""
_PAD, _ROW = 10.0, 15.0
_LONGEST = 34
"""Letters in a box."""
_MARGIN = 8.0
_LEAST = 0.75
"""How far a picture shrinks to fit beside the other one, before it scrolls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box of a picture."""

    kind: str
    """Classes of its looks: op, own (of moecc), group, moe, pill, changed."""
    rows: tuple[str, ...]
    """Its name, and a smaller line below."""
    text: str
    """What is shown when it is chosen."""
    opens: str = ""
    """The key of the group that it stands for."""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height, in pixels."""
        letters = max(map(len, self.rows))
        return letters * _LETTER + 2 * _PAD, len(self.rows) * _ROW + 9


def draw(
    group: Group,
    lines: Mapping[str, Line],
    readers: Mapping[str, Collection[str]],
    blocks: Mapping[str, str],
) -> str:
    """Draw a group as SVG.

    `lines` are all of the graph, `readers` who reads each, `blocks` labels of MoE blocks by path.
    """
    names: list[Collection[str]] = [{line.name for line in one.lines} for one in group.members]
    owner = {name: number for number, some in enumerate(names) for name in some}
    reads = [
        dict.fromkeys(name for line in one.lines for name in line.inputs if name not in some)
        for one, some in zip(group.members, names, strict=True)
    ]
    outside = dict.fromkeys(
        name
        for some in reads
        for name in some
        if name not in owner and not name.startswith("@") and name in lines
    )
    boxes = [_pill(lines[name]) for name in outside]
    shift, sources = len(boxes), {name: number for number, name in enumerate(outside)}
    boxes += [_box(one, blocks) for one in group.members]
    sources |= {name: number + shift for name, number in owner.items()}
    edges = {
        (sources[name], number + shift): None
        for number, some in enumerate(reads)
        for name in some
        if name in sources
    }
    leaves = [
        number + shift
        for number, some in enumerate(names)
        if any(reader not in owner for name in some for reader in readers.get(name, ()))
    ]
    if leaves:
        boxes.append(Box(kind="pill", rows=("on from here",), text="read by what comes after"))
        edges |= dict.fromkeys((leaf, len(boxes) - 1) for leaf in leaves)
    return _svg(boxes, list(edges), place([box.size for box in boxes], list(edges)))


def _pill(line: Line) -> Box:
    rows = tuple(_short(row, 26) for row in (line.printed, line.made) if row)
    return Box(kind="pill", rows=rows, text=line.text)


def _box(member: Member, blocks: Mapping[str, str]) -> Box:
    marks = " changed" if member.changed else ""
    if isinstance(member, Op):
        return _op(member, marks)
    label = next((blocks[path] for path in blocks if _holds(member, path)), "")
    count = f"{member.nodes} nodes"
    title = f"{member.title}  ×{member.repeats}" if member.repeats > 1 else member.title
    rows = (_short(title, 44), f"{label} · {count}" if label else count)
    text = f"{member.path or member.title}: {count}" + (f"; {label}" if label else "")
    return Box(kind=f"group{' moe' * bool(label)}{marks}", rows=rows, text=text, opens=member.key)


def _holds(group: Group, path: str) -> bool:
    return bool(group.path) and (path == group.path or path.startswith(f"{group.path}."))


def _op(op: Op, marks: str) -> Box:
    line = op.line
    owned = [name.lstrip("@").split(".") for name in line.inputs if name.startswith("@")]
    name = f"{line.target} · {_weight(owned[0])}" if len(owned) == 1 else line.target
    own = " own" if line.target.startswith("moecc.") else ""
    return Box(
        kind=f"op{own}{marks}",
        rows=tuple(map(_short, filter(None, (name, line.made)))),
        text=line.text,
    )


def _weight(path: Sequence[str]) -> str:
    """Name a tensor of the model, `gate_up_proj`, or its module where it is but the `weight`."""
    return path[-2] if path[-1] == "weight" and len(path) > 1 else path[-1]


def _short(text: str, most: int = _LONGEST) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _svg(boxes: Sequence[Box], edges: Sequence[tuple[int, int]], layout: Layout) -> str:
    width, height = layout.width + 2 * _MARGIN, layout.height + 2 * _MARGIN
    drawn = [_edge(route) for route in layout.routes]
    drawn += [_draw_box(box, *center) for box, center in zip(boxes, layout.centers, strict=True)]
    return (
        f'<svg class="graph" width="{width:.0f}" style="min-width:{width * _LEAST:.0f}px" '
        f'viewBox="{-_MARGIN} {-_MARGIN} {width:.0f} {height:.0f}">' + "".join(drawn) + "</svg>"
    )


def _edge(route: Sequence[tuple[float, float]]) -> str:
    (x, y), *rest = route
    path = [f"M{x:.0f} {y:.0f}"]
    for at, (to_x, to_y) in enumerate(rest):
        if at % 2:  # through a layer
            path.append(f"V{to_y:.0f}")
        else:
            middle = (y + to_y) / 2
            path.append(f"C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}")
        x, y = to_x, to_y
    return f'<path class="edge" d="{"".join(path)}"/>'


def _draw_box(box: Box, x: float, y: float) -> str:
    width, height = box.size
    round_ = height / 2 if box.kind == "pill" else 5
    top = y - height / 2 + (height - len(box.rows) * _ROW) / 2
    texts = "".join(
        f'<text x="{x:.0f}" y="{top + _ROW * (row + 0.72):.0f}"'
        f"{' class=sub' if row else ''}>{escape(text)}</text>"
        for row, text in enumerate(box.rows)
    )
    opens = f' data-open="{escape(box.opens)}"' if box.opens else ""
    return (
        f'<g class="{box.kind}" tabindex="0" role="button"{opens} data-text="{escape(box.text)}">'
        f'<rect x="{x - width / 2:.0f}" y="{y - height / 2:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" rx="{round_:.0f}"/>{texts}</g>'
    )

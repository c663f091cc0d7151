"""Group a graph's nodes by the modules they come from, and fold what repeats, before it is drawn.

A group is a run of neighbours in the graph's order, which is topological, so that no two groups
read each other: predictions of a later layer that are computed amid an earlier one are a run apart.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from moecc.report_html.listing import Line

MOST = 60
"""Members that are drawn side by side; more are cut into parts."""
_PART = 30
_PERIODS = range(1, 7)
_NAME = re.compile(r"%\w+")
_OWNED = re.compile(r"@[\w.]*?(\w+)(?=[^\w.]|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """A node that is drawn by itself."""

    line: Line
    changed: bool

    @property
    def lines(self) -> tuple[Line, ...]:
        """The node, as a group has its."""
        return (self.line,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A module's nodes, drawn as one box that opens."""

    key: str
    """Unlike its neighbours': what a place in the tree is made of."""
    title: str
    path: str
    """The module's."""
    members: tuple["Op | Group", ...]
    """What it opens to; of repeated groups the first."""
    lines: tuple[Line, ...]
    """All nodes in it, those of its repetitions as well."""
    changed: bool
    repeats: int = 1

    @property
    def nodes(self) -> int:
        """Count nodes, those of called graphs at each call."""
        return sum(len(line.body) or 1 for line in self.lines)


Member = Op | Group


def group(lines: Sequence[Line], changed: frozenset[str]) -> Group:
    """Group a whole graph; its inputs are in no group."""
    own = [line for line in lines if not line.is_input]
    return _group("", "", own, changed)


def _group(key: str, path: str, lines: Sequence[Line], changed: frozenset[str]) -> Group:
    members: list[Member] = []
    for child, run in groupby(lines, key=lambda line: _child(line.path, path)):
        nodes = list(run)
        if not child or len(nodes) == 1:
            members += [_node(line, changed) for line in nodes]
        else:
            members.append(_group(child, f"{path}.{child}".lstrip("."), nodes, changed))
    if len(members) == 1 and isinstance(only := members[0], Group):
        title = f"{key}.{only.title}".lstrip(".")
        return replace(only, key=title, title=title)
    return Group(
        key=key,
        title=key,
        path=path,
        members=_apart(_cut(_fold(members))),
        lines=tuple(lines),
        changed=any(line.name in changed for line in lines),
    )


def _node(line: Line, changed: frozenset[str]) -> Member:
    """Give a node, or what the graph that it calls opens to."""
    altered = line.name in changed
    if not line.body:
        return Op(line=line, changed=altered)
    called = group(line.body, changed)
    return replace(
        called,
        key=line.target,
        title=line.target,
        lines=(line,),
        changed=altered or called.changed,
    )


def _child(path: str, parent: str) -> str:
    """Name the module below a parent that a path goes through, `layers.3`; nothing for its own."""
    if parent and not path.startswith(f"{parent}."):
        return ""
    first, *rest = path[len(parent) :].lstrip(".").split(".")
    for part in rest:
        if not part.isdecimal():
            break
        first = f"{first}.{part}"
    return first


def _fold(members: Sequence[Member]) -> list[Member]:
    """Put runs of members that compute alike into one, where there is a group among them."""
    kinds = [_signature(one) for one in members]
    folded: list[Member] = []
    at = 0
    while at < len(members):
        period, times = max(
            ((period, _times(kinds, at, period)) for period in _PERIODS),
            key=lambda one: (one[1] > 1) * one[0] * one[1],
        )
        once = members[at : at + period]
        groups = [one for one in once if isinstance(one, Group)]
        if times < 2 or not groups:
            folded.append(members[at])
            at += 1
            continue
        run = members[at : at + period * times]
        last = [one for one in run if isinstance(one, Group)][-1]
        title = f"{groups[0].title} … {last.title}"
        inside = groups[0].members if len(once) == 1 else tuple(once)
        folded.append(
            Group(
                key=groups[0].key if len(once) == 1 else title,
                title=title,
                path=groups[0].path,
                members=inside,
                lines=tuple(line for one in run for line in one.lines),
                changed=any(one.changed for one in run),
                repeats=times,
            )
        )
        at += period * times
    return folded


def _times(kinds: Sequence[object], at: int, period: int) -> int:
    """Count how often the next few come again at once."""
    first, times = kinds[at : at + period], 1
    while kinds[at + times * period : at + (times + 1) * period] == first:
        times += 1
    return times


def _signature(member: Member) -> object:
    """Say what a member computes, but for the names of nodes and numbers of modules."""
    numbers: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        return str(numbers.setdefault(found[0], len(numbers)))

    lines = [_OWNED.sub(r"@\1", line.text.partition("  # ")[0]) for line in member.lines]
    texts = tuple(_NAME.sub(number, line) for line in lines)
    made = tuple(line.made for line in member.lines)
    return isinstance(member, Group), member.changed, texts, made


def _cut(members: Sequence[Member]) -> list[Member]:
    """Cut what is too much for one picture into parts."""
    if len(members) <= MOST:
        return list(members)
    size = max(_PART, -(-len(members) // MOST))
    parts: list[Member] = []
    for start in range(0, len(members), size):
        some = tuple(members[start : start + size])
        title = f"nodes {start + 1} to {start + len(some)}"
        lines = tuple(line for one in some for line in one.lines)
        altered = any(one.changed for one in some)
        parts.append(
            Group(key=title, title=title, path="", members=some, lines=lines, changed=altered)
        )
    return parts


def _apart(members: Sequence[Member]) -> tuple[Member, ...]:
    """Tell groups apart whose neighbours have the same key."""
    seen: dict[str, int] = {}
    named: list[Member] = []
    for one in members:
        if isinstance(one, Group):
            count = seen[one.key] = seen.get(one.key, 0) + 1
            one = replace(one, key=f"{one.key} ({count})") if count > 1 else one
        named.append(one)
    return tuple(named)


def groups_in(group: Group, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Group]:
    """List a group and all that it opens to by their place: the keys on the way to them."""
    found = {place: group}
    for one in group.members:
        if isinstance(one, Group):
            found |= groups_in(one, (*place, one.key))
    return found


def focus(group: Group) -> tuple[str, ...]:
    """Find the first place where a node has changed, not only groups of nodes."""
    altered = [one for one in group.members if one.changed]
    if not altered or any(isinstance(one, Op) for one in altered):
        return ()
    first = next(one for one in altered if isinstance(one, Group))
    return (first.key, *focus(first))

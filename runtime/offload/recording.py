"""Keep what a run asked of its caches in a file: a line about the run, then one for each event.

{"format": 1, "model": ..., "blocks": [...], "pools": [...], ...}
{"ranking": 1, "experts": [7, 3, 30, 1], "active": 2}      block 1 will likely ask for 7 and 3
{"guess": 1, "experts": [7]}                               and 7 was let in
{"request": 0, "tokens": 1, "experts": [4, 9], "hits": 1}  block 0 asked for 4 and 9
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from moecc.runtime.errors import StoreError
from moecc.runtime.offload.plan import Demand
from moecc.runtime.offload.trace import Event, Guess, Ranking, Request

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """One pool of slots, and what its engine counted."""

    slots: int
    asked: int
    hits: int
    predicted: int


_COUNTED = tuple(field.name for field in fields(Pooled))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A run: its model and settings, and every event in order."""

    model: str
    policy: str
    blocks: tuple[Demand, ...]
    """In the order of their numbers."""
    pool_of: tuple[int, ...]
    """For each block, whose slots it uses."""
    pools: tuple[Pooled, ...]
    other_bytes: int
    """Of weights beside the experts: what every token reads, too."""
    decode_rate: float
    """Tokens a second of the run, which is not steady: it begins with empty slots."""
    events: tuple[Event, ...]

    def of_pool(self, number: int) -> list[Event]:
        """List the events of one pool."""
        return [event for event in self.events if self.pool_of[block_of(event)] == number]

    def of_block(self, number: int) -> list[Event]:
        """List the events of one block."""
        return [event for event in self.events if block_of(event) == number]

    def shared(self) -> "Recording":
        """Put blocks whose records are of one size into one pool, with the slots of all of them."""
        sizes = [self.size_in(number) for number in range(len(self.pools))]
        kinds = list(dict.fromkeys(sizes))

        def sum_up(size: int) -> Pooled:
            same = [pool for pool, one in zip(self.pools, sizes, strict=True) if one == size]
            return Pooled(**{name: sum(getattr(one, name) for one in same) for name in _COUNTED})

        pool_of = tuple(kinds.index(block.size) for block in self.blocks)
        return replace(self, pool_of=pool_of, pools=tuple(map(sum_up, kinds)))

    def size_in(self, number: int) -> int:
        """Give the bytes of a record in a pool."""
        return self.blocks[self.pool_of.index(number)].size


def block_of(event: Event) -> int:
    """Say which block an event is about."""
    return event.block if isinstance(event, Request) else event.keys[0][0]


def write(recording: Recording, file: Path) -> None:
    """Write a recording as JSON lines."""
    about = asdict(recording)
    del about["events"]
    lines = [{"format": FORMAT} | about, *map(_to_line, recording.events)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(file: Path) -> Recording:
    """Read a recording.

    Raises `StoreError` naming the file and the line that is not as `write` writes it.
    """
    number = 1  # of the line, for the message
    try:
        lines = file.read_text().splitlines()
        about: dict[str, Any] = json.loads(lines[0])
        if about.pop("format") != FORMAT:
            raise ValueError("its format is another version's; record it again")
        about["blocks"] = tuple(Demand(**one) for one in about["blocks"])
        about["pools"] = tuple(Pooled(**one) for one in about["pools"])
        about["pool_of"] = tuple(about["pool_of"])
        events: list[Event] = []
        for line in lines[1:]:
            number += 1
            events.append(_from_line(json.loads(line), about["blocks"]))
        return Recording(**about, events=tuple(events))
    except OSError as error:
        raise StoreError(f"cannot read the trace {str(file)!r}: {error.strerror}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{str(file)!r} is no trace of `moecc trace`: line {number}: {error or 'is missing'}"
        ) from error


def _to_line(event: Event) -> dict[str, Any]:
    if isinstance(event, Request):
        hits = {"hits": event.hits}
        return {"request": event.block, "tokens": event.tokens, "experts": event.experts} | hits
    line: dict[str, Any] = {"experts": [expert for _, expert in event.keys]}
    if isinstance(event, Ranking):
        return {"ranking": block_of(event)} | line | {"active": event.active}
    return {"guess": block_of(event)} | line


def _from_line(line: dict[str, Any], blocks: Sequence[Demand]) -> Event:
    kind, block = next(iter(line.items()))
    experts = tuple(map(int, line["experts"]))
    if not all(0 <= expert < blocks[block].experts for expert in experts):
        raise ValueError(f"block {block} has no such expert as in {list(experts)}")
    keys = tuple((block, expert) for expert in experts)
    if kind == "request":
        return Request(block=block, tokens=line["tokens"], experts=experts, hits=line["hits"])
    if not keys:
        raise ValueError("a prediction names no expert")
    return Ranking(keys=keys, active=line["active"]) if kind == "ranking" else Guess(keys=keys)

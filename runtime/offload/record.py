"""Lay one expert's matrices out in a record: what is read, cached and evicted as one.

    record    gate_up | down            in the model's own layout
              gate_up | down | up       codes of a scheme, uint8

Matrices begin at whole cache lines and records are whole pages long, so that direct I/O can read a
record into any slot. Slots are an array of records; a kernel reads each matrix of all of them as
one tensor whose first stride is a record.
"""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moecc.runtime.errors import InputError

LINE = 64
PAGE = 4096
"""Direct I/O moves whole pages: offsets, lengths and addresses are multiples of it."""

NAMES = ("gate_up", "down", "up")
"""What a kernel calls the matrices of an expert, in the order of a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One matrix of an expert in its record."""

    name: str
    shape: tuple[int, ...]
    """Of one expert."""
    dtype: torch.dtype
    offset: int
    """Bytes from the beginning of the record."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The parts of a record, in order."""

    parts: tuple[Part, ...]

    @staticmethod
    def of(matrices: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> "Layout":
        """Lay out the matrices of an expert, given by name as shape and dtype."""
        parts: list[Part] = []
        end = 0
        for name in NAMES:
            if name in matrices:
                shape, dtype = matrices[name]
                parts.append(Part(name=name, shape=tuple(shape), dtype=dtype, offset=end))
                end = up_to(end + parts[-1].size, LINE)
        return Layout(parts=tuple(parts))

    @property
    def size(self) -> int:
        """Bytes from one record to the next."""
        last = self.parts[-1]
        return up_to(last.offset + last.size, PAGE)

    def tensors(self, records: torch.Tensor) -> dict[str, torch.Tensor]:
        """See records, uint8 [slots, size], as tensors [slots, *shape] by name."""
        seen: dict[str, torch.Tensor] = {}
        for part in self.parts:
            columns = records[:, part.offset : part.offset + part.size].view(part.dtype)
            seen[part.name] = columns.unflatten(1, part.shape)
        return seen


def up_to(size: int, unit: int) -> int:
    """Round a size up to whole units."""
    return -(-size // unit) * unit


def new_records(count: int, layout: Layout) -> tuple[mmap.mmap, torch.Tensor]:
    """Allocate records, uint8 [count, size], page-aligned; memory is taken as they are written.

    Raises `InputError` when the address space does not have it.
    """
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a forked child writes to its own copy
        memory = mmap.mmap(-1, count * layout.size, flags)
    except (OSError, ValueError, OverflowError) as error:
        size = count * layout.size
        raise InputError(f"cannot allocate {size:,} bytes for {count} experts: {error}") from error
    return memory, torch.frombuffer(memory, dtype=torch.uint8).view(count, layout.size)

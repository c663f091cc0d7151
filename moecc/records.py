"""Remember what was compiled, so that `moecc.report` can tell."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moecc.passes.ir import Miss
from moecc.passes.options import Options
from moecc.passes.pipeline import Result, Step
from moecc.watching import Watch


@dataclass(slots=True, kw_only=True)
class Record:
    """One compiled graph."""

    options: Options
    steps: tuple[Step, ...]
    blocks: tuple[Any, ...]
    lowerings: tuple[Any, ...]
    placements: tuple[Any, ...]
    attentions: tuple[Any, ...]
    linears: tuple[Any, ...]
    callees: tuple[Any, ...]
    notes: tuple[Miss, ...]
    """What capture saw while the graph was traced."""
    tensors: tuple[weakref.ref[torch.Tensor], ...]
    """What the graph was compiled with: Dynamo lifts a model's parameters and buffers to inputs."""
    watch: Watch
    """What compiling it took."""
    calls: int = 0

    @staticmethod
    def of(
        result: Result,
        options: Options,
        inputs: Sequence[torch.Tensor],
        notes: tuple[Miss, ...],
        watch: Watch,
    ) -> "Record":
        """Keep what a report needs, without keeping graph or weights alive."""
        record = Record(
            options=options,
            steps=result.steps,
            blocks=result.program.blocks,
            lowerings=result.program.lowerings,
            placements=result.program.placements,
            attentions=result.program.attentions,
            linears=result.program.linears,
            callees=result.program.callees,
            notes=notes,
            tensors=tuple(map(weakref.ref, inputs)),
            watch=watch,
        )
        _records.append(record)
        return record

    @property
    def misses(self) -> tuple[Miss, ...]:
        """Everything that was left alone, capture's notes first."""
        return (*self.notes, *(miss for step in self.steps for miss in step.misses))

    def count(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the compiled graph so that its calls are counted."""

        def counted(*args: Any) -> Any:
            self.calls += 1
            return compiled(*args)

        return counted

    def reads(self, tensors: set[int]) -> bool:
        """Tell whether the graph was compiled with one of these tensors, given by `id`."""
        return any(id(tensor()) in tensors for tensor in self.tensors)


_records: list[Record] = []
_notes: "weakref.WeakKeyDictionary[nn.Module, list[str]]" = weakref.WeakKeyDictionary()


def note(model: nn.Module, text: str) -> None:
    """Have every report on a model say something that was found when it was loaded."""
    _notes.setdefault(model, []).append(text)


def notes_about(model: nn.Module) -> tuple[str, ...]:
    """Give what was noted about a model, oldest first."""
    return tuple(_notes.get(model, ()))


def all_records() -> tuple[Record, ...]:
    """Every graph that moecc compiled in this process, oldest first."""
    return tuple(_records)

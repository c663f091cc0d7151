"""Keep what was made of a model's tensors, and make it again when one of them is written to."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class _Copy(Generic[Made]):
    origins: tuple[StorageWeakRef, ...]
    versions: tuple[int, ...]
    made: Made


class Copies(Generic[Made]):
    """Copies by the place of their tensors in memory.

    A write through `.data` does not count as one for torch, and so not here. Copies of tensors that
    are gone go when the next copy is made.
    """

    def __init__(self, make: Callable[[Sequence[torch.Tensor | None]], Made]) -> None:
        self._make = make
        self._copies: dict[tuple[object, ...], _Copy[Made]] = {}
        self._lock = threading.Lock()

    def of(self, tensors: Sequence[torch.Tensor | None]) -> Made:
        """Give what was made of some tensors; make it if they are new, or newly written."""
        given = [one for one in tensors if one is not None]
        key = tuple(None if one is None else _place(one) for one in tensors)
        versions = tuple(map(_version, given))
        known = self._copies.get(key)
        if known is not None and known.versions == versions and _alive(known):
            return known.made
        with self._lock:
            known = self._copies.get(key)
            if known is None or known.versions != versions or not _alive(known):
                self._copies = {place: one for place, one in self._copies.items() if _alive(one)}
                origins = tuple(StorageWeakRef(one.untyped_storage()) for one in given)
                known = self._copies[key] = _Copy(origins, versions, self._make(tensors))
            return known.made


def _place(tensor: torch.Tensor) -> object:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]


def _alive(one: _Copy[Any]) -> bool:
    return not any(cast(Any, origin).expired() for origin in one.origins)

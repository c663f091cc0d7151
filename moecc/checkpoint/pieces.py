"""Follow what a model does to the tensors of its checkpoint without reading them.

transformers stacks, concatenates and transposes the tensors of a checkpoint into the parameters of
a model. `Piece` stands in for such a tensor: torch functions on pieces give pieces, and one expert
of the result can be asked for alone. Where that is a plain copy of bytes, `copies` says which, and
a cache can read them straight from the checkpoint; everything else is computed by `read`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from moecc.checkpoint.files import Tensor
from moecc.runtime.errors import StoreError


class Piece:
    """A tensor that is described, not read: one of a file, or made of others."""

    def __init__(
        self, kind: str, shape: Sequence[int], parts: Sequence["Piece"], dims: tuple[int, ...] = ()
    ) -> None:
        self.kind, self.parts, self.dims = kind, tuple(parts), dims
        self.shape = torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors that it is made of."""
        return self.parts[0].dtype

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Give the number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Give the shape, or one size."""
        return self.shape if dim is None else self.shape[dim]

    def transpose(self, one: int, other: int) -> "Piece":
        """Swap two dimensions."""
        one, other = one % self.ndim, other % self.ndim
        shape = list(self.shape)
        shape[one], shape[other] = shape[other], shape[one]
        return Piece("transpose", shape, [self], (one, other))

    def contiguous(self) -> "Piece":
        """Give itself: layout is decided when it is read."""
        return self

    def select(self, index: int) -> "Piece":
        """Give one entry of the first dimension.

        Raises `StoreError` where that cannot be told from the parts.
        """
        if self.kind == "stack" and self.dims == (0,):
            return self.parts[index]
        if self.kind == "cat" and self.dims[0] > 0:
            return cat([part.select(index) for part in self.parts], self.dims[0] - 1)
        if self.kind == "cat":
            return self._entry_of_parts(index)
        if self.kind == "transpose" and 0 not in self.dims:
            return self.parts[0].select(index).transpose(self.dims[0] - 1, self.dims[1] - 1)
        raise StoreError(f"an entry of a {self.kind} along dimension {self.dims} is not one piece")

    def copies(self) -> Iterator[Tensor] | None:
        """List the bytes that follow one another in it, or None if it is no plain copy."""
        if self.kind not in ("cat", "stack") or self.dims != (0,):
            return None
        inner = [part.copies() for part in self.parts]
        found = [one for one in inner if one is not None]
        return (t for one in found for t in one) if len(found) == len(inner) else None

    def read(self, tensor: Callable[[Tensor], torch.Tensor]) -> torch.Tensor:
        """Compute it; `tensor` reads one of a file."""
        parts = [part.read(tensor) for part in self.parts]
        if self.kind == "transpose":
            return parts[0].transpose(*self.dims)
        return {"stack": torch.stack, "cat": torch.cat}[self.kind](parts, dim=self.dims[0])

    def _entry_of_parts(self, index: int) -> "Piece":
        for part in self.parts:
            if index < part.shape[0]:
                return part.select(index)
            index -= part.shape[0]
        raise StoreError(f"there is no entry {index} behind the last of {self.shape}")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> "Piece":
        """Answer for the torch functions that checkpoints are converted with."""
        makers: dict[Any, Callable[..., Piece]] = {torch.stack: stack, torch.cat: cat}
        if func not in makers:
            name = getattr(func, "__name__", func)
            raise StoreError(f"this checkpoint's experts are converted with torch.{name}")
        return makers[func](*args, **(kwargs or {}))


@dataclass(eq=False)
class Stored(Piece):
    """A tensor of a file, or a range of its first dimensions."""

    tensor: Tensor

    def __post_init__(self) -> None:
        super().__init__("stored", self.tensor.shape, ())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return self.tensor.dtype

    def select(self, index: int) -> Piece:
        """Give one entry of the first dimension: a range of bytes."""
        count, *shape = self.tensor.shape
        if not 0 <= index < count:
            raise StoreError(f"there is no entry {index} of {count}")
        offset = self.tensor.offset + index * (self.tensor.size // count)
        return Stored(
            Tensor(
                file=self.tensor.file, offset=offset, shape=tuple(shape), dtype=self.tensor.dtype
            )
        )

    def copies(self) -> Iterator[Tensor] | None:
        """Give itself."""
        return iter([self.tensor])

    def read(self, tensor: Callable[[Tensor], torch.Tensor]) -> torch.Tensor:
        """Read it."""
        return tensor(self.tensor)


def stack(tensors: Sequence[Piece], dim: int = 0) -> Piece:
    """Put pieces of one shape along a new dimension."""
    shape = list(tensors[0].shape)
    dim %= len(shape) + 1
    _check_alike([tuple(one.shape) for one in tensors])
    return Piece("stack", [*shape[:dim], len(tensors), *shape[dim:]], tensors, (dim,))


def cat(tensors: Sequence[Piece], dim: int = 0) -> Piece:
    """Put pieces one behind another along a dimension."""
    shape = list(tensors[0].shape)
    dim %= len(shape)
    _check_alike([(*one.shape[:dim], *one.shape[dim + 1 :]) for one in tensors])
    shape[dim] = sum(one.shape[dim] for one in tensors)
    return Piece("cat", shape, tensors, (dim,))


def _check_alike(shapes: list[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        raise StoreError(f"experts have different shapes: {sorted(set(shapes))}")


def as_piece(value: Any) -> Piece:
    """Give a value that has to be a piece; raises `StoreError` for anything else."""
    if isinstance(value, list):
        (value,) = cast("list[Any]", value)
    if not isinstance(value, Piece):
        raise StoreError(f"this checkpoint's experts are made of a {type(value).__name__}")
    return value

"""Stand for weights that a checkpoint holds as codes: MXFP4, FP8, GPTQ, AWQ.

Such a weight is several tensors: codes, scales, maybe zeros. `fold` puts one `Coded` piece in their
place, under the name that the weight would have, so that a model's conversions work on it as on any
other tensor. Experts keep their codes (`quantized`); everything else is dequantized (`read`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeVar

import torch

from moecc.checkpoint.files import Tensor
from moecc.checkpoint.pieces import Piece, Stored
from moecc.runtime.errors import InputError, StoreError
from moecc.runtime.schemes.scheme import Quantized, Scheme

Made = TypeVar("Made")


class Coding(Protocol):
    """What the file of a format has. Its errors are `InputError`; a piece adds the name."""

    method: ClassVar[str]
    """`quant_method` of the checkpoint's configuration."""
    weight_suffix: ClassVar[str]
    """Behind the name of a weight without codes."""
    suffixes: ClassVar[Mapping[str, str]]
    """What stands there instead, by role: `codes` and `scales`, and others."""
    optional: ClassVar[frozenset[str]]
    """Roles that may be missing."""
    transposed: ClassVar[bool]
    """The model has the matrices of experts input-major, [E, K, N]."""

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Check shapes and dtypes; give the weight's shape [N, K], or [E, N, K]."""
        ...

    def scheme(self) -> Scheme:
        """Give the scheme that holds the codes as they are; raises if there is none."""
        ...

    def quantized(self, read: Mapping[str, torch.Tensor]) -> Quantized:
        """Give a matrix [N, K] in that scheme, K filled up to whole groups; raises if it cannot."""
        ...

    def weight(self, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Give the float32 matrix [N, K] that codes stand for."""
        ...


@dataclass(eq=False)
class Coded(Piece):
    """A weight in codes."""

    name: str
    stored: Mapping[str, Tensor]
    """By role."""
    coding: Coding

    def __post_init__(self) -> None:
        super().__init__("coded", self._named(lambda: self.coding.shape(self.stored)), ())

    @property
    def dtype(self) -> torch.dtype:
        """Of what it is read as."""
        return torch.float32

    def select(self, index: int) -> Piece:
        """Give one matrix of [E, N, K]."""
        if len(self.shape) < 3:
            raise StoreError(f"{self.name!r} is one matrix, not one for each expert")
        entries = {role: Stored(one).select(index) for role, one in self.stored.items()}
        tensors = {role: one.tensor for role, one in entries.items() if isinstance(one, Stored)}
        return replace(self, name=f"{self.name}[{index}]", stored=tensors)

    def read(self, tensor: Callable[[Tensor], torch.Tensor]) -> torch.Tensor:
        """Dequantize it: float32 [N, K]."""
        return self._named(lambda: self.coding.weight(self._read(tensor)).contiguous())

    def scheme(self) -> Scheme:
        """Give the scheme that holds its codes.

        Raises `StoreError` if there is none.
        """
        return self._named(self.coding.scheme)

    def quantized(self, tensor: Callable[[Tensor], torch.Tensor]) -> Quantized:
        """Read its codes."""
        return self._named(lambda: self.coding.quantized(self._read(tensor)))

    def _read(self, tensor: Callable[[Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        read = {role: tensor(one) for role, one in self.stored.items()}
        scales = read.get("scales", read["codes"])
        if scales.is_floating_point() and not scales.float().isfinite().all():
            raise InputError("its scales hold inf or NaN")
        return read

    def _named(self, compute: Callable[[], Made]) -> Made:
        try:
            return compute()
        except InputError as error:
            file = self.stored["codes"].file
            raise StoreError(f"{self.name!r} in {str(file)!r}: {error}") from error


def fold(tensors: Mapping[str, Tensor], coding: Coding) -> dict[str, Piece]:
    """Put a piece in the place of each tensor, one for all that make a weight in codes.

    Raises `StoreError` naming a tensor that lacks another, or has a shape or dtype that is none.
    """
    # Codes may have the name of a plain weight, so what tells is a name with a suffix of its own.
    anchor = "codes" if coding.suffixes["codes"] != coding.weight_suffix else "scales"
    pieces: dict[str, Piece] = {}
    used: set[str] = set()
    for name in tensors:
        if not name.endswith(coding.suffixes[anchor]):
            continue
        base = name.removesuffix(coding.suffixes[anchor])
        names = {role: base + suffix for role, suffix in coding.suffixes.items()}
        missing = [
            one for role, one in names.items() if one not in tensors and role not in coding.optional
        ]
        if missing:
            raise StoreError(f"{name!r} in {str(tensors[name].file)!r} is without {missing}")
        weight = base + coding.weight_suffix
        stored = {role: tensors[one] for role, one in names.items() if one in tensors}
        piece = Coded(weight, stored, coding)
        pieces[weight] = piece.transpose(-1, -2) if coding.transposed else piece
        used.update(names.values())
    for name in tensors.keys() - used:
        if tensors[name].dtype.itemsize == 1 and tensors[name].dtype.is_floating_point:
            raise StoreError(f"{name!r} in {str(tensors[name].file)!r} is fp8 without scales")
        pieces[name] = Stored(tensors[name])
    return pieces


def coded_parts(piece: Piece) -> Iterator[Coded | Stored]:
    """Give the tensors that a piece is made of."""
    if isinstance(piece, Coded | Stored):
        yield piece
    for part in piece.parts:
        yield from coded_parts(part)


def tensors_of(piece: Piece) -> Iterator[Tensor]:
    """Give the tensors of files that a piece is made of."""
    for part in coded_parts(piece):
        yield from part.stored.values() if isinstance(part, Coded) else (part.tensor,)

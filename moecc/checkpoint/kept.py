"""Keep the codes of a checkpoint: the scheme that holds them, and one expert in it."""

import torch

from moecc.checkpoint.coded import Coded, coded_parts
from moecc.checkpoint.pieces import Piece
from moecc.checkpoint.sources import read_tensor
from moecc.codegen.spec import KernelSpec
from moecc.runtime.errors import InputError, StoreError
from moecc.runtime.schemes.packing import pack
from moecc.runtime.schemes.scheme import Quantized, Scheme, Schemes


def kept_schemes(path: str, pieces: tuple[Piece, Piece]) -> Schemes | None:
    """Give the schemes that hold a block's codes as they are; None if it has no codes.

    Raises `StoreError` naming the tensor whose codes no scheme holds, and the block whose weights
    are partly codes.
    """
    first, second = (_scheme(path, piece) for piece in pieces)
    if first is None and second is None:
        return None
    if first is None or second is None:
        raise StoreError(f"{path!r} has codes for one of its products and plain weights for one")
    return Schemes(first=first, second=second)


def _scheme(path: str, piece: Piece) -> Scheme | None:
    parts = list(coded_parts(piece))
    coded = [part for part in parts if isinstance(part, Coded)]
    if not coded:
        return None
    if len(coded) < len(parts):
        raise StoreError(f"{path!r} has codes for some experts and plain weights for others")
    try:
        kinds = {part.coding: part for part in reversed(coded)}
        scheme, *others = (part.scheme() for part in kinds.values())
        if others:
            raise StoreError(f"{path!r} has experts in {scheme} and {', '.join(map(str, others))}")
        return scheme
    except StoreError as error:
        raise StoreError(
            f"{error}; give quantize= to have experts rounded anew, to a scheme that kernels read"
        ) from error


def packed_codes(
    spec: KernelSpec, schemes: Schemes, pieces: tuple[Piece, Piece]
) -> dict[str, torch.Tensor]:
    """Read an expert's codes and pack them: `gate_up` (gates alone, if gated), `down` and `up`.

    `pieces` are one expert's. Raises `StoreError` or `InputError` when codes cannot be kept.
    """
    first = _matrices(pieces[0], spec.transposed)
    (down,) = _matrices(pieces[1], spec.down_transposed)
    if spec.gated and len(first) == 1:
        first = _halves(spec, first[0], schemes.first.rows)
    packed = {
        name: pack(one, schemes.first) for name, one in zip(("gate_up", "up"), first, strict=False)
    }
    return packed | {"down": pack(down, schemes.second)}


def _matrices(piece: Piece, transposed: bool) -> list[Quantized]:
    """Read what lies one behind another in a matrix, output-major."""
    if transposed:
        piece = piece.parts[0] if piece.kind == "transpose" else piece.transpose(0, 1)
    parts = piece.parts if piece.kind == "cat" and piece.dims == (0,) else (piece,)
    if not all(isinstance(part, Coded) for part in parts):
        raise InputError("the model has its codes in an order that kernels do not read")
    return [part.quantized(read_tensor) for part in parts if isinstance(part, Coded)]


def _halves(spec: KernelSpec, both: Quantized, shared: int) -> list[Quantized]:
    """Part gates and ups, which are rows of one matrix, `shared` of them under one scale."""
    half = len(both.codes) // 2
    if shared > 1 and (spec.interleaved or half % shared):
        raise InputError(f"gates and ups, {half} rows each, share scales of {shared} rows")

    def part(matrix: torch.Tensor, place: int, middle: int) -> torch.Tensor:
        if spec.interleaved:
            return matrix[place::2]
        return matrix[middle:] if place else matrix[:middle]

    return [
        Quantized(
            codes=part(both.codes, place, half),
            scales=part(both.scales, place, half // shared),
            zeros=None if both.zeros is None else part(both.zeros, place, half),
        )
        for place in (0, 1)
    ]

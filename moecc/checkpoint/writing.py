"""Write files that are there in full or not at all."""

import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from moecc.checkpoint.files import Tensor
from moecc.checkpoint.packed import dtype_name, padded_header, shard_header
from moecc.checkpoint.pieces import Piece, Stored
from moecc.checkpoint.sources import read_tensor
from moecc.runtime.errors import StoreError
from moecc.runtime.offload.record import LINE
from moecc.runtime.offload.store import bytes_of

_CHUNK = 1 << 24


_AGAIN = "what is packed so far is kept, run moecc pack again to go on"


def write_whole(target: Path, write: Callable[[Path], None], advice: str = _AGAIN) -> None:
    """Write a file so that it is there in full or not at all.

    Raises `StoreError` with the advice when the disk is full; files that are complete stay.
    """
    part = target.with_suffix(".part")
    try:
        write(part)
        part.replace(target)
        _flush_folder(target.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StoreError(f"cannot write {str(target)!r}: {error}; {advice}") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(target: Path, text: str) -> None:
    """Write a text file."""

    def write(part: Path) -> None:
        with part.open("w") as opened:
            opened.write(text)
            flush(opened)

    write_whole(target, write)


def flush(opened: IO[Any]) -> None:
    """See to it that what was written is on disk."""
    opened.flush()
    os.fsync(opened.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_of(piece: Piece) -> int:
    """Give the bytes that a piece takes when it is read."""
    return math.prod(piece.shape) * piece.dtype.itemsize


def write_pieces(pieces: Mapping[str, Piece], part: Path) -> None:
    """Write pieces into a safetensors file: tensors of other files as they are, others computed.

    In memory is one of those that are computed.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, piece in pieces.items():
        start, end = end, end + size_of(piece)
        entries[name] = {
            "dtype": dtype_name(piece.dtype),
            "shape": [*piece.shape],
            "data_offsets": [start, end],
        }
    with part.open("wb") as opened:
        opened.write(padded_header(entries, LINE))
        for piece in pieces.values():
            if isinstance(piece, Stored):
                _copy(piece.tensor, opened)
            else:
                known = piece.read(read_tensor).contiguous()
                opened.write(bytes_of(known.view(torch.uint8).flatten()))
        flush(opened)


def _copy(tensor: Tensor, opened: IO[bytes]) -> None:
    with tensor.file.open("rb") as source:
        source.seek(tensor.offset)
        left = tensor.size
        while left:
            data = source.read(min(left, _CHUNK))
            if not data:
                raise StoreError(f"{str(tensor.file)!r} became shorter while it was packed")
            opened.write(data)
            left -= len(data)


def write_records(
    name: str,
    records: Iterable[torch.Tensor],
    experts: int,
    length: int,
    show: Callable[[int], None],
    part: Path,
) -> None:
    """Write a shard: records, then the header with their checksums in front of them."""
    checksums = [0] * experts
    start = len(shard_header(name, experts, length, checksums))
    with part.open("wb") as opened:
        opened.seek(start)
        for expert, record in enumerate(records):
            data = bytes_of(record)
            checksums[expert] = zlib.crc32(data)
            opened.write(data)
            show((expert + 1) * length)
        opened.seek(0)
        opened.write(shard_header(name, experts, length, checksums))
        flush(opened)

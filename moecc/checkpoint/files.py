"""Read the headers of safetensors files: names, dtypes, shapes and places of tensors.

Nothing else is read, so that a checkpoint of any size is looked through in moments.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from moecc.runtime.errors import StoreError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST = 100_000_000
"""Bytes of a header that the format allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor in a file."""

    file: Path
    offset: int
    """Of its first byte in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def shards(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint folder: one, or those that its index names.

    Raises `StoreError` when there are none, or one of the index is missing.
    """
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    if whole.is_file():  # what transformers reads if it is there
        files = [whole]
    elif index.is_file():
        try:
            names = set(
                cast("dict[str, str]", json.loads(index.read_text())["weight_map"]).values()
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise StoreError(f"{str(index)!r} is not an index of shards: {error!r}") from error
        files = [folder / name for name in sorted(names)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"lacks {missing}" if missing else "holds no *.safetensors file"
        raise StoreError(f"checkpoint {str(folder)!r} {what}; download it again, in safetensors")
    return files


def read_headers(files: Iterable[Path]) -> dict[str, Tensor]:
    """List every tensor of some files by name.

    Raises `StoreError` naming the file, and the tensor, when one is damaged or cut off.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        found.update(_tensors(file))
    return found


def header(file: Path) -> tuple[dict[str, Any], int]:
    """Read a file's header and give it with the offset of the data behind it."""
    with file.open("rb") as opened:
        first = opened.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _LONGEST + 1
        if length > _LONGEST:
            raise StoreError(f"{str(file)!r} is no safetensors file, or is cut off")
        try:
            parsed = json.loads(opened.read(length))
        except ValueError as error:
            raise StoreError(f"the header of {str(file)!r} is damaged: {error}") from error
    if not isinstance(parsed, dict):
        raise StoreError(f"the header of {str(file)!r} is no mapping of tensors")
    return cast("dict[str, Any]", parsed), 8 + length


def _tensors(file: Path) -> dict[str, Tensor]:
    entries, start = header(file)
    end = file.stat().st_size
    found: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            begin, stop = map(int, entry["data_offsets"])
            dtype, shape = DTYPES.get(entry["dtype"]), tuple(map(int, entry["shape"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{str(file)!r} describes tensor {name!r} badly: {error!r}") from error
        if dtype is None:
            continue  # formats that nothing here reads, such as sub-byte ones
        tensor = Tensor(file=file, offset=start + begin, shape=shape, dtype=dtype)
        if begin < 0 or stop - begin != tensor.size:
            what = f"gives tensor {name!r} {stop - begin} bytes, and its shape needs {tensor.size}"
            raise StoreError(f"{str(file)!r} {what}")
        if start + stop > end:
            raise StoreError(
                f"{str(file)!r} ends at byte {end:,} and tensor {name!r} at {start + stop:,}: it "
                "is cut off; download it again"
            )
        found[name] = tensor
    return found
